"""A token server as Azure's registry has it, with the identity services before it.

Signs ES256 tokens that Debian's registry checks by certificate. Users: pusher:s3cret may push, reader:r
may pull. Start at `TokenServer.answer`.
"""

import base64
import datetime
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = tuple[int, dict[str, str], bytes]


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1 that is its own CA; return certificate and key."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder / f"{name}.crt", folder / f"{name}.key"


@dataclass
class TokenServer:
    """Answers /oauth2/token and /oauth2/exchange, and the Entra and metadata endpoints."""

    folder: Path
    service: str = "myreg.azurecr.io"
    issuer: str = "tok.test"
    life_s: int = 3600
    age_s: int = 0
    """How long ago tokens pretend to be issued: beyond `life_s` they are expired from the start."""
    federated: str = "federated-1"
    refresh_tokens: set[str] = field(default_factory=lambda: {"refresh-ok"})
    issued: list[str] = field(default_factory=list)
    """Scopes of each access token."""
    grants: list[str] = field(default_factory=list)
    """What each login used: anonymous, basic USER, refresh, exchange, federated, metadata."""

    def __post_init__(self) -> None:
        self.certificate, self.key = make_certificate(self.folder, "tokens")

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(path)
        form = {k: " ".join(v) for k, v in parse_qs(url.query).items()}
        form |= {k: " ".join(v) for k, v in parse_qs(body.decode()).items()}
        if url.path == "/oauth2/token":
            return self.token(form, headers.get("Authorization", ""))
        if url.path == "/oauth2/exchange":
            self.grants.append("exchange")
            if form.get("access_token") != "entra-token" or form.get("grant_type") != "access_token":
                return _json(401, '{"errors":[{"code":"UNAUTHORIZED","message":"bad identity token"}]}')
            self.refresh_tokens.add("refresh-exchanged")
            return _json(200, '{"refresh_token":"refresh-exchanged"}')
        if url.path.endswith("/oauth2/v2.0/token"):
            self.grants.append("federated")
            if form.get("client_assertion") != self.federated:
                return _json(
                    401, '{"error":"invalid_client","error_description":"AADSTS700024: expired\\ntrace"}'
                )
            return _json(200, '{"access_token":"entra-token"}')
        if url.path == "/metadata/identity/oauth2/token":
            self.grants.append("metadata")
            if headers.get("Metadata") != "true":
                return _json(400, '{"error":"no metadata header"}')
            return _json(200, '{"access_token":"entra-token"}')
        return _json(404, "{}")

    def token(self, form: dict[str, str], authorization: str) -> Answer:
        actions = {"pull"}
        if form.get("grant_type") == "refresh_token":
            self.grants.append("refresh")
            if form.get("refresh_token") not in self.refresh_tokens:
                return _json(401, '{"errors":[{"code":"UNAUTHORIZED","message":"invalid refresh token"}]}')
            actions = {"pull", "push", "delete"}
        elif authorization.startswith("Basic "):
            user, _, password = base64.b64decode(authorization[6:]).decode().partition(":")
            self.grants.append(f"basic {user}")
            if (user, password) not in {("pusher", "s3cret"), ("reader", "r")}:
                return _json(401, '{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}')
            actions = {"pull", "push", "delete"} if user == "pusher" else {"pull"}
        else:
            self.grants.append("anonymous")
        self.issued.append(form.get("scope", ""))
        access = []
        for scope in form.get("scope", "").split():
            kind, name, wanted = scope.split(":")
            access.append({"type": kind, "name": name, "actions": sorted(actions & set(wanted.split(",")))})
        return _json(200, f'{{"access_token":"{self.sign(access)}"}}')

    def sign(self, access: list[dict[str, object]]) -> str:
        now = int(time.time()) - self.age_s
        claims = {"iss": self.issuer, "aud": self.service, "sub": "x", "iat": now, "nbf": now - 10}
        claims |= {"exp": now + self.life_s, "jti": str(uuid.uuid4()), "access": access}
        der = x509.load_pem_x509_certificate(self.certificate.read_bytes()).public_bytes(
            serialization.Encoding.DER
        )
        header = {"x5c": [base64.b64encode(der).decode()]}
        return jwt.encode(claims, self.key.read_bytes(), algorithm="ES256", headers=header)


def _json(status: int, text: str) -> Answer:
    return status, {"Content-Type": "application/json"}, text.encode()
