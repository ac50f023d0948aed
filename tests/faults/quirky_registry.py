"""A registry in memory that behaves as its `Quirks` say: what differs between the registries people push to.

Speaks the OCI distribution protocol on a free port of 127.0.0.1 and keeps a list of requests; `elsewhere` is
a second port with the same content, where redirects lead. Start at `Quirks` and `_Handler.handle_any`.
"""

import base64
import hashlib
import http.server
import json
import re
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

Headers = Iterable[tuple[str, str]]
Answer = tuple[int, Headers, bytes]
USER, PASSWORD, TOKEN = "pusher", "s3cret", "token-1"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass(frozen=True)
class Quirks:
    """What this registry does otherwise than Debian's."""

    patch_status: int = 202
    put_status: int = 201
    body_limit: int | None = None
    """413 above it."""
    body_limit_cuts: bool = False
    """Close the connection instead of answering 413."""
    chunk_limit: int | None = None
    """416 "too large" for a PATCH with Content-Range above it."""
    chunk_least: int | None = None
    """OCI-Chunk-Min-Length, and 416 for a chunk below it."""
    chunk_refusal: int | None = None
    """Status of a PATCH with a Content-Range."""
    patch_refusal: int | None = None
    """Status of every PATCH."""
    keeps_first_chunk_only: bool = False
    """Accept further chunks and drop them."""
    stale_range: bool = False
    """Name the end of the first PATCH in every Range."""
    range_prefix: str = ""
    range_of_body: bool = False
    """Name the bytes of this body in the Range of a PATCH, not those of the whole."""
    status: int = 204
    """Status of a GET of the upload."""
    status_extra: int = 0
    """Bytes too many in the Range of a GET of the upload."""
    keeps_partial: bool = True
    """Keep what arrived of a body whose connection broke."""
    state: bool = False
    """The newest `_state` is needed in the address of an upload, and every PATCH changes it."""
    location: str = "path"
    """How Location is written: path, absolute, query, or another host name with {port}."""
    redirects_uploads: int | None = None
    """Status of the redirect of POST, PATCH and PUT of blobs to `elsewhere`."""
    redirects_blobs: int | None = None
    cookie: str = ""
    """Set it, and refuse every request that sends one."""
    auth: str = ""
    """basic, bearer, or both (Basic first, in one header; a token is needed)."""
    anonymous: int = 401
    """What a request without credentials gets, below /v2/."""
    referrers: bool = False
    """Serve the referrers API of OCI 1.1, and say so with OCI-Subject."""
    unknown_route: int = 404
    """What a request for referrers gets without that."""
    strict_azure: bool = False
    """Refuse chunked transfer encoding, and a Content-Range with a unit."""


@dataclass(frozen=True)
class Seen:
    port: int
    method: str
    path: str
    length: int
    headers: dict[str, str]


@dataclass
class Content:
    """What both ports share."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    received: int = 0
    """Bytes of upload bodies that arrived."""


class QuirkyRegistry(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        quirks: Quirks = Quirks(),
        *,
        certificate: tuple[Path, Path] | None = None,
        beside: "QuirkyRegistry | None" = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.quirks = quirks
        self.content = beside.content if beside else Content()
        self.is_elsewhere = beside is not None
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.realm = ""
        """Address of the token server; this registry itself when empty."""
        self.token_answer: Callable[[dict[str, list[str]], dict[str, str]], Answer] = self._give_token
        self.challenges: list[str] = []
        """WWW-Authenticate headers instead of those of `quirks.auth`."""
        self.forbids = ""
        """An Authorization header that gets a 403."""
        self.slow_bytes_s: float | None = None
        self.elsewhere = None if beside else QuirkyRegistry(Quirks(), beside=self)
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def seen(self) -> list[Seen]:
        return self.content.seen

    def find(self, method: str, path: str = "") -> list[Seen]:
        return [s for s in self.seen if re.fullmatch(method, s.method) and re.search(path, s.path)]

    def stop(self) -> None:
        for server in (self, self.elsewhere):
            if server is not None:
                server.shutdown()
                server.server_close()

    def _give_token(self, form: dict[str, list[str]], headers: dict[str, str]) -> Answer:
        if headers.get("Authorization") != BASIC:
            return 401, [], b""
        return 200, [], json.dumps({"token": TOKEN}).encode()

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are the point here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QuirkyRegistry

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        body = self.read_body(url.path)
        if body is None:
            self.close_connection = True
            return
        headers = {name.title(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.server.port, self.command, self.path, len(body), headers))
        status, answer_headers, data = self.answer_to(url.path, parse_qs(url.query), body)
        self.send_response(status)
        if self.server.quirks.cookie:
            self.send_header("Set-Cookie", self.server.quirks.cookie)
        for key, value in answer_headers:
            self.send_header(key, value)
        if not any(key == "Content-Length" for key, _ in answer_headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 - its names

    def read_body(self, path: str) -> bytes | None:
        """Read the body; None when the connection broke, or is to be broken."""
        left, data, quirks = int(self.headers.get("Content-Length") or 0), bytearray(), self.server.quirks
        if quirks.body_limit_cuts and quirks.body_limit is not None and left > quirks.body_limit:
            return None
        while left:
            chunk = self.rfile.read1(min(left, 1 << 16))  # type: ignore[attr-defined]
            if not chunk:
                if quirks.keeps_partial and self.command == "PATCH":
                    self.content.uploads[_upload_id(path)] += data
                return None
            data += chunk
            left -= len(chunk)
            if "/blobs/uploads/" in path:
                self.content.received += len(chunk)
            if self.server.slow_bytes_s:
                time.sleep(len(chunk) / self.server.slow_bytes_s)
        return bytes(data)

    @property
    def content(self) -> Content:
        return self.server.content

    def answer_to(self, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        quirks = self.server.quirks
        if path == "/token":
            form = query | parse_qs(body.decode())
            return self.server.token_answer(form, dict(self.headers.items()))
        if quirks.cookie and self.headers.get("Cookie"):
            return _error(403, "FORBIDDEN", "CSRF token invalid")
        if (refusal := self.check_login(path)) is not None:
            return refusal
        if path == "/v2/":
            return 200, [], b"{}"
        if "/blobs/uploads/" in path:
            return self.answer_upload(path, query, body)
        if "/blobs/" in path:
            return self.answer_blob(path)
        if "/referrers/" in path:
            return self.answer_referrers(path)
        return self.answer_manifest(path, body)

    def check_login(self, path: str) -> Answer | None:
        quirks, header = self.server.quirks, self.headers.get("Authorization", "")
        if self.server.is_elsewhere or not (quirks.auth or self.server.challenges):
            return None
        if header == (BASIC if quirks.auth == "basic" else f"Bearer {TOKEN}"):
            return None
        if header and header == self.server.forbids:
            return _error(403, "DENIED", "expired")
        realm = self.server.realm or f"{self.server.scheme}://{self.server.host}/token"
        basic, bearer = 'Basic realm="R, with a comma"', f'Bearer realm="{realm}",service="r"'
        offered = {"basic": [basic], "bearer": [bearer], "both": [f"{basic}, {bearer}"]}.get(quirks.auth, [])
        status = 401 if path == "/v2/" or header else quirks.anonymous
        if status != 401:
            return _error(status, "DENIED", "hidden")
        return status, [("WWW-Authenticate", each) for each in self.server.challenges or offered], b""

    def redirect(self, status: int) -> Answer:
        assert self.server.elsewhere is not None
        return status, [("Location", f"http://{self.server.elsewhere.host}{self.path}")], b""

    def answer_upload(self, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        quirks, upload = self.server.quirks, _upload_id(path)
        if quirks.redirects_uploads and self.command in {"POST", "PATCH", "PUT"}:
            return self.redirect(quirks.redirects_uploads)
        if self.command == "POST":
            upload = uuid.uuid4().hex
            self.content.uploads[upload] = bytearray()
            least = [("OCI-Chunk-Min-Length", str(quirks.chunk_least))] if quirks.chunk_least else []
            return 202, [("Location", self.location(path, upload)), ("Range", "0-0"), *least], b""
        if upload not in self.content.uploads:
            return _error(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown")
        if quirks.state and query.get("_state") != [self.content.states.get(upload)]:
            return _error(404, "BLOB_UPLOAD_UNKNOWN", "not the newest address")
        if self.command == "PATCH":
            return self.patch(path, upload, body)
        if self.command == "GET":
            size = max(0, len(self.content.uploads[upload]) + quirks.status_extra - 1)
            headers = [("Location", self.location(path, upload)), ("Range", f"{quirks.range_prefix}0-{size}")]
            return quirks.status, headers if quirks.status < 300 else [], b""
        if self.command == "DELETE":
            del self.content.uploads[upload]
            return 204, [], b""
        if (refusal := self.too_large(body)) is not None:
            return refusal
        data = bytes(self.content.uploads.pop(upload)) + body
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if query.get("digest") != [digest]:
            return _error(400, "DIGEST_INVALID", "provided digest did not match uploaded content")
        self.content.blobs[digest] = data
        return quirks.put_status, [("Docker-Content-Digest", digest)], b""

    def patch(self, path: str, upload: str, body: bytes) -> Answer:
        quirks, stored = self.server.quirks, self.content.uploads[upload]
        ranged = self.headers.get("Content-Range", "")
        if (refusal := self.refuse_patch(body, ranged, len(stored))) is not None:
            return refusal
        if not (quirks.keeps_first_chunk_only and stored):
            stored += body
        first = self.content.firsts.setdefault(upload, len(stored))
        end = first if quirks.stale_range else len(body) if quirks.range_of_body else len(stored)
        headers = [("Location", self.location(path, upload))]
        return quirks.patch_status, [*headers, ("Range", f"{quirks.range_prefix}0-{max(0, end - 1)}")], b""

    def refuse_patch(self, body: bytes, ranged: str, offset: int) -> Answer | None:
        quirks = self.server.quirks
        if quirks.patch_refusal:
            return _error(quirks.patch_refusal, "UNSUPPORTED", "no PATCH")
        if quirks.strict_azure and (self.headers.get("Transfer-Encoding") or "bytes" in ranged):
            return _error(400, "BLOB_UPLOAD_INVALID", "the Content-Range header format is invalid")
        if ranged and quirks.chunk_refusal:
            return _error(quirks.chunk_refusal, "UNSUPPORTED", "chunked uploads are not supported")
        if ranged and quirks.chunk_limit is not None and len(body) > quirks.chunk_limit:
            message = "the request body is too large and exceeds the maximum permissible limit of 4.00MiB"
            return _error(416, "REQUESTED_RANGE_NOT_SATISFIABLE", message)
        if ranged and quirks.chunk_least and len(body) < quirks.chunk_least and not offset:
            return _error(416, "SIZE_INVALID", "chunk too small")
        if ranged and not quirks.keeps_first_chunk_only and int(ranged.partition("-")[0]) != offset:
            return _error(416, "RANGE_INVALID", "another offset")
        return self.too_large(body)

    def too_large(self, body: bytes) -> Answer | None:
        limit = self.server.quirks.body_limit
        return (
            _error(413, "SIZE_INVALID", "body too large") if limit is not None and len(body) > limit else None
        )

    def location(self, path: str, upload: str) -> str:
        quirks, base = self.server.quirks, path.partition("/blobs/uploads/")[0] + "/blobs/uploads/"
        query = ""
        if quirks.state:
            self.content.states[upload] = uuid.uuid4().hex
            query = f"?_state={self.content.states[upload]}"
        if quirks.location == "query" and self.command != "POST":
            return query or "?_state=zzz"
        if quirks.location == "path":
            return f"{base}{upload}{query}"
        host = self.server.host if quirks.location in {"absolute", "query"} else quirks.location
        return f"{self.server.scheme}://{host.format(port=self.server.port)}{base}{upload}{query}"

    def answer_blob(self, path: str) -> Answer:
        data = self.content.blobs.get(path.rpartition("/")[2])
        if data is None:
            return _error(404, "BLOB_UNKNOWN", "blob unknown")
        if self.command == "HEAD":
            return 200, [("Content-Length", str(len(data)))], b""
        if self.server.quirks.redirects_blobs:
            return self.redirect(self.server.quirks.redirects_blobs)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            at = int(start[1])
            return 206, [("Content-Range", f"bytes {at}-{len(data) - 1}/{len(data)}")], data[at:]
        return 200, [], data

    def answer_manifest(self, path: str, body: bytes) -> Answer:
        repository, _, selector = path.rpartition("/manifests/")
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for name in (selector, digest):
                self.content.manifests[f"{repository} {name}"] = self.headers["Content-Type"], body
            subject = json.loads(body).get("subject") if self.server.quirks.referrers else None
            said = [("OCI-Subject", subject["digest"])] if subject else []
            return self.server.quirks.put_status, [("Docker-Content-Digest", digest), *said], b""
        found = self.content.manifests.get(f"{repository} {selector}")
        if found is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        return 200, [("Content-Type", found[0])], found[1]

    def answer_referrers(self, path: str) -> Answer:
        """List the manifests of the repository whose subject is asked for, each once."""
        repository, _, subject = path.rpartition("/referrers/")
        if not self.server.quirks.referrers:
            return _error(self.server.quirks.unknown_route, "NOT_FOUND", "no such route")
        entries = []
        for name, (kind, body) in self.content.manifests.items():
            where, _, selector = name.partition(" ")
            document = json.loads(body)
            about = (document.get("subject") or {}).get("digest")
            if where == repository and selector.startswith("sha256:") and about == subject:
                entry = {"mediaType": kind, "digest": selector, "size": len(body)}
                stated = {key: document[key] for key in ("artifactType", "annotations") if key in document}
                entries.append(entry | stated)
        kind = "application/vnd.oci.image.index.v1+json"
        listed = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
        return 200, [("Content-Type", kind)], json.dumps(listed).encode()

    def log_message(self, *args: object) -> None:
        """The tests read `seen` instead."""


def _upload_id(path: str) -> str:
    return path.rpartition("/blobs/uploads/")[2]


def _error(status: int, code: str, message: str) -> Answer:
    return status, [], json.dumps({"errors": [{"code": code, "message": message}]}).encode()
