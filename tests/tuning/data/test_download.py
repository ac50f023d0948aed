"""Fetching from a server that misbehaves: fault tests 12 to 20, 22 and 23."""

import gzip
import hashlib
import io
import logging
import random
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from pydantic import SecretStr

from runtime import files, oci
from runtime.errors import CapacityError, DataError, TransientError
from runtime.net import DownloadLimits
from runtime.tuning.data import download as fetching
from runtime.tuning.data import folder, hops
from runtime.tuning.data.download import fetch
from runtime.tuning.data.hops import Hops
from runtime.tuning.settings import DataSource
from tests.faults.dataset_server import DatasetServer, Reply
from tests.faults.quirky_registry import QuirkyRegistry
from tests.faults.registry_tokens import make_certificate

QUICK = DownloadLimits(attempts=3, backoff_s=0.02, stall_s=20, deadline_s=60)
HASTY = replace(QUICK, stall_s=0.3)


def parquet(rows: int = 400) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": f"row {n} {n * n}"} for n in range(rows)]), sink)
    return sink.getvalue()


BODY = parquet()


def get(folder: Path, *urls: str, limits: DownloadLimits = QUICK, **settings: Any) -> Path:
    """Fetch `urls` into `folder` and return the first file's path."""
    source = DataSource(urls=urls, folder=folder, **settings)
    fetch(source, limits=limits)
    return local_paths(source)[0]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def local_paths(source: DataSource) -> list[Path]:
    return folder.local_paths(source.urls, source.folder)


def test_file_is_fetched_once_and_kept(tmp_path: Path) -> None:
    with DatasetServer({"/rows.parquet": [Reply(BODY)]}) as server:
        url = server.url("/rows.parquet?sig=secret")
        assert get(tmp_path, url).read_bytes() == BODY
        assert get(tmp_path, url).read_bytes() == BODY
        assert len(server.requests["/rows.parquet"]) == 1
    assert leftovers(tmp_path) == ["rows.parquet"]


def test_fault_12_stalled_server_is_tried_again_then_given_up(tmp_path: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY, silent_s=60), Reply(BODY)]}) as server:
        assert get(tmp_path, server.url("/a.parquet"), limits=HASTY).read_bytes() == BODY
    with DatasetServer({"/b.parquet": [Reply(BODY, silent_s=60)]}) as server:
        with pytest.raises(TransientError, match="gave up after 3 tries"):
            get(tmp_path, server.url("/b.parquet"), limits=HASTY)
        assert len(server.requests["/b.parquet"]) == 3


def test_fault_13_dripping_server_is_left(tmp_path: Path) -> None:
    with (
        DatasetServer({"/a.parquet": [Reply(BODY, drip_s=0.05)]}) as server,
        pytest.raises(TransientError, match=r"bytes/s, less than 1024"),
    ):
        get(tmp_path, server.url("/a.parquet"), limits=HASTY)


def test_deadline_ends_a_slow_download(tmp_path: Path) -> None:
    slow = DownloadLimits(attempts=3, stall_s=9, deadline_s=0.4, rate_bytes_s=0)
    with (
        DatasetServer({"/a.parquet": [Reply(BODY, drip_s=0.02)]}) as server,
        pytest.raises(TransientError, match="not complete after"),
    ):
        get(tmp_path, server.url("/a.parquet"), limits=slow)


def test_fault_14_truncated_body_is_resumed(tmp_path: Path) -> None:
    digest = hashlib.sha256(BODY).hexdigest()
    with DatasetServer({"/a.parquet": [Reply(BODY, cut=500), Reply(BODY, cut=700), Reply(BODY)]}) as server:
        path = get(tmp_path, server.url(f"/a.parquet#sha256={digest}"))
        ranges = [request.get("range") for request in server.requests["/a.parquet"]]
    assert path.read_bytes() == BODY
    assert ranges == [None, "bytes=500-", "bytes=1200-"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(BODY, length=len(BODY) - 50), "cut short: after"),
        (Reply(BODY, length=None, cut=1000), "cut short: after"),
        (Reply(BODY, length=len(BODY) + 50), "gave up after"),
    ],
    ids=["too-small", "absent", "too-big"],
)
def test_fault_15_wrong_length_is_noticed(tmp_path: Path, reply: Reply, message: str) -> None:
    with (
        DatasetServer({"/a.parquet": [reply]}) as server,
        pytest.raises((DataError, TransientError), match=message),
    ):
        get(tmp_path, server.url("/a.parquet"))
    assert not (tmp_path / "a.parquet").exists()


def test_fault_16_server_errors_are_tried_again_and_retry_after_is_kept(tmp_path: Path) -> None:
    replies = [Reply(status=500), Reply(status=503), Reply(BODY)]
    with DatasetServer({"/a.parquet": replies}) as server:
        assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY
    began = time.monotonic()
    with DatasetServer(
        {"/b.parquet": [Reply(status=429, headers={"Retry-After": "1"}), Reply(BODY)]}
    ) as server:
        get(tmp_path, server.url("/b.parquet"))
    assert time.monotonic() - began >= 1
    with DatasetServer({"/c.parquet": [Reply(status=429, headers={"Retry-After": "900"})]}) as server:
        with pytest.raises(TransientError, match="answered 429"):
            get(tmp_path, server.url("/c.parquet"))
        assert len(server.requests["/c.parquet"]) == 1


def test_fault_16_retry_after_may_be_a_date(tmp_path: Path) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2.9), usegmt=True)
    past = {"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}
    slow = DownloadLimits(
        attempts=3, backoff_s=600, stall_s=20, deadline_s=900
    )  # what is kept to is the date
    replies = [Reply(status=429, headers={"Retry-After": later}), Reply(status=503, headers=past)]
    began = time.monotonic()
    with DatasetServer({"/a.parquet": [*replies, Reply(BODY)]}) as server:
        assert get(tmp_path, server.url("/a.parquet"), limits=slow).read_bytes() == BODY
    assert datetime.now(UTC) >= parsedate_to_datetime(later)
    assert time.monotonic() - began < 200  # 3; the backoff alone would be 300 to 600
    with DatasetServer(
        {"/b.parquet": [Reply(status=429, headers={"Retry-After": "soon"}), Reply(BODY)]}
    ) as server:
        assert get(tmp_path, server.url("/b.parquet")).read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_fault_17_refusals_are_final_and_show_no_query(tmp_path: Path, status: int) -> None:
    with DatasetServer({"/a.parquet": [Reply(status=status)]}) as server:
        with pytest.raises(DataError) as caught:
            get(tmp_path, server.url("/a.parquet?sig=topsecret"))
        assert len(server.requests["/a.parquet"]) == 1
    assert f"/a.parquet: answered {status}" in str(caught.value)
    assert "topsecret" not in str(caught.value)


def to(location: str) -> Reply:
    return Reply(status=302, headers={"Location": location})


def test_fault_18_redirects_are_followed_a_few_times_and_never_to_metadata(tmp_path: Path) -> None:
    replies = {
        "/once": [to("/a.parquet")],
        "/a.parquet": [Reply(BODY)],
        "/loop": [to("/loop")],
        "/file": [to("file:///etc/passwd")],
        "/metadata": [to("http://169.254.169.254/latest/meta-data/")],
        "/metadata6": [to("http://[fd00:ec2::254]/latest/")],
        "/mapped": [to("http://[::ffff:169.254.169.254]/latest/")],
    }
    with DatasetServer(replies) as server:
        assert get(tmp_path, server.url("/once")).read_bytes() == BODY
        for path, message in (
            ("/loop", "more than 5 redirects"),
            ("/file", "only http and https"),
            ("/metadata", "never fetched"),
            ("/metadata6", "never fetched"),
            ("/mapped", "never fetched"),
        ):
            with pytest.raises(DataError, match=message):
                get(tmp_path, server.url(path))


def test_fault_18_token_goes_to_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY)]}) as server:
        source = DataSource(urls=(server.url("/a.parquet"),), folder=tmp_path)
        monkeypatch.setattr(hops, "HUB_HOSTS", frozenset({"127.0.0.1"}))  # plain http: still not sent
        fetch(source, token=SecretStr("hf_aaaaaaaaaaaa"), limits=QUICK)
        assert all("authorization" not in request for request in server.requests["/a.parquet"])


def test_private_addresses_are_a_choice(tmp_path: Path) -> None:
    with (
        DatasetServer({"/a.parquet": [Reply(BODY)]}) as server,
        pytest.raises(DataError, match=r"private address 127.0.0.1"),
    ):
        get(tmp_path, server.url("/a.parquet"), allow_private_addresses=False)


def test_fault_19_ignored_range_or_changed_file_starts_over(tmp_path: Path) -> None:
    other = parquet(500)
    with DatasetServer({"/a.parquet": [Reply(BODY, cut=500), Reply(BODY, ranges=False)]}) as server:
        assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY
    with DatasetServer({"/b.parquet": [Reply(BODY, cut=500), Reply(other, etag='"two"')]}) as server:
        assert get(tmp_path, server.url("/b.parquet")).read_bytes() == other
    wrong = Reply(BODY, headers={"Content-Range": f"bytes 0-9/{len(BODY)}"})
    with DatasetServer({"/c.parquet": [Reply(BODY, cut=500), wrong, Reply(BODY)]}) as server:
        assert get(tmp_path, server.url("/c.parquet")).read_bytes() == BODY


@pytest.mark.parametrize(
    ("name", "body"), [("a.parquet", parquet(0)), ("a.parquet.gz", gzip.compress(parquet(3), mtime=0))]
)
def test_parts_without_rows_and_compressed_files_are_fetched(tmp_path: Path, name: str, body: bytes) -> None:
    with DatasetServer({f"/{name}": [Reply(body)]}) as server:
        get(tmp_path, server.url(f"/{name}"))
    assert (tmp_path / name).read_bytes() == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<!DOCTYPE html><html>please log in</html>", "not data but a web page"),
        (gzip.compress(BODY, mtime=0), r"not a parquet file; it starts with b'\\x1f\\x8b"),
        (b"", "the file is empty"),
        (b"PAR1" + b"x" * 500, "cut short: after"),
    ],
    ids=["html", "gzip", "empty", "half"],
)
def test_fault_20_what_is_no_data_is_refused_with_its_first_bytes(
    tmp_path: Path, body: bytes, message: str
) -> None:
    with DatasetServer({"/a.parquet": [Reply(body)]}) as server, pytest.raises(DataError, match=message):
        get(tmp_path, server.url("/a.parquet"))
    assert leftovers(tmp_path) == []


def test_fault_22_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    first, second = parquet(3), parquet(4)
    replies = {
        "/x/rows.parquet": [Reply(first)],
        "/y/rows.parquet": [Reply(second)],
        "/x/a%20b.parquet": [Reply(first)],
    }
    with DatasetServer(replies) as server:
        urls = tuple(
            server.url(p) for p in ("/x/rows.parquet", "/y/rows.parquet?download=true", "/x/a%20b.parquet")
        )
        source = DataSource(urls=urls, folder=tmp_path)
        fetch(source, limits=QUICK)
        paths = local_paths(source)
    assert [path.read_bytes() for path in paths] == [first, second, first]
    assert paths[2].name == "a b.parquet"
    many = DataSource(urls=tuple(f"http://h/{n}/rows.parquet" for n in range(1000)), folder=tmp_path)
    assert len(set(local_paths(many))) == 1000
    assert local_paths(many) == local_paths(many)
    nasty = DataSource(urls=("http://h/..%2f..%2fetc%2fpasswd", "http://h/", "http://h/.."), folder=tmp_path)
    assert [path.parent for path in local_paths(nasty)] == [tmp_path] * 3


def test_two_nodes_that_share_the_folder_fetch_each_file_once(tmp_path: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY, silent_s=0.2)], "/b.parquet": [Reply(BODY)]}) as server:
        urls = (server.url("/a.parquet"), server.url("/b.parquet"))
        with ThreadPoolExecutor() as nodes:
            for path in nodes.map(lambda _: get(tmp_path, *urls), range(2)):
                assert path.read_bytes() == BODY
        assert [len(server.requests[path]) for path in ("/a.parquet", "/b.parquet")] == [1, 1]
    assert sorted(leftovers(tmp_path)) == ["a.parquet", "b.parquet"]


def test_a_folder_that_another_fetches_into_for_too_long_is_worth_a_retry(tmp_path: Path) -> None:
    limits = replace(QUICK, deadline_s=0.2)
    with (
        files.locked(tmp_path / fetching.LOCK, wait_s=0),
        pytest.raises(TransientError, match="another process has been fetching into"),
    ):
        get(tmp_path, "http://127.0.0.1:1/a.parquet", limits=limits)


def test_files_that_are_there_need_no_lock(tmp_path: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY)]}) as server:
        get(tmp_path, server.url("/a.parquet"))
        with files.locked(tmp_path / fetching.LOCK, wait_s=0):
            assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY


def test_address_listed_twice_is_one_file(tmp_path: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY)], "/b/a.parquet": [Reply(parquet(3))]}) as server:
        urls = tuple(server.url(path) for path in ("/a.parquet", "/b/a.parquet", "/a.parquet"))
        source = DataSource(urls=urls, folder=tmp_path)
        fetch(source, limits=QUICK)
        assert len(server.requests["/a.parquet"]) == 1
    assert [path.read_bytes() for path in local_paths(source)] == [BODY, parquet(3)]


def test_a_renewed_signature_fetches_nothing_again(tmp_path: Path) -> None:
    with DatasetServer({"/a.parquet": [Reply(BODY)]}) as server:
        for key in ("first", "renewed"):
            get(tmp_path, server.url(f"/a.parquet?sv=2024&se={key}&sp=r&sig={key}"))
        assert len(server.requests["/a.parquet"]) == 1
        get(tmp_path, server.url("/a.parquet?sv=2024&se=x&sp=r&sig=x&versionId=2"))
        assert len(server.requests["/a.parquet"]) == 2


def test_folder_of_local_data_is_not_made(tmp_path: Path) -> None:
    fetch(DataSource(folder=tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


def test_fault_23_wrong_digest_is_refused_and_removed(tmp_path: Path) -> None:
    with (
        DatasetServer({"/a.parquet": [Reply(BODY)]}) as server,
        pytest.raises(DataError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}"),
    ):
        get(tmp_path, server.url(f"/a.parquet#sha256={'0' * 64}"))
    assert leftovers(tmp_path) == []


def test_fault_10_file_larger_than_the_disk_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with (
        DatasetServer({"/a.parquet": [Reply(BODY, length=1 << 60, cut=10)]}) as server,
        pytest.raises(CapacityError, match=f"{1 << 60} bytes needed for a.parquet"),
    ):
        get(tmp_path, server.url("/a.parquet"))


def test_one_failure_ends_the_other_downloads(tmp_path: Path) -> None:
    began = time.monotonic()
    with DatasetServer(
        {"/slow.parquet": [Reply(BODY, drip_s=0.1)], "/gone.parquet": [Reply(status=404)]}
    ) as server:
        patient = DownloadLimits(attempts=3, stall_s=30, rate_bytes_s=0)
        with pytest.raises(DataError, match="answered 404"):
            get(tmp_path, server.url("/slow.parquet"), server.url("/gone.parquet"), limits=patient)
    assert time.monotonic() - began < 60  # the slow one takes 300


def test_fault_56_no_signature_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    replies = [Reply(status=500), Reply(BODY, cut=100), Reply(BODY)]
    with DatasetServer({"/a.parquet": replies}) as server:
        get(tmp_path, server.url("/a.parquet?sig=topsecret").replace("http://", "http://user:passw0rd@"))
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("runtime"))
    assert "trying again" in logged
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in ("topsecret", "passw0rd"):
        assert secret not in logged
        assert secret.encode() not in files


def test_fault_5_stop_before_the_connection_is_open_ends_the_request_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.parquet"
        ended = Hops(url, None, allow_private=True, limits=DownloadLimits(stall_s=5))
        ended.hang_up()
        with closing(ended), pytest.raises(httpx.RemoteProtocolError), ended.get({}):
            pass


def test_a_certificate_that_is_not_trusted_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a registry: the next try would meet the same certificate."""
    certificate = make_certificate(tmp_path, "server")
    server = QuirkyRegistry(certificate=certificate)
    source = DataSource(urls=(f"https://{server.host}/v2/",), folder=tmp_path / "data")
    try:
        with pytest.raises(DataError, match=r"certificate is not trusted \(self-signed.*set SSL_CERT_FILE"):
            fetch(source, limits=DownloadLimits(attempts=2, backoff_s=0.01))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        fetch(source, limits=DownloadLimits(attempts=1))
    finally:
        server.stop()
    assert [path.name for path in (tmp_path / "data").glob("[!.]*")]


CODINGS = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}


@pytest.mark.parametrize("coding", CODINGS)
def test_body_that_was_compressed_unasked_is_decoded(tmp_path: Path, coding: str) -> None:
    body = CODINGS[coding](BODY)
    with DatasetServer({"/a.parquet": [Reply(body, headers={"Content-Encoding": coding})]}) as server:
        for digest in (hashlib.sha256(BODY), hashlib.sha256(body)):  # as it is, and as the server has it
            folder = tmp_path / digest.hexdigest()
            path = get(folder, server.url(f"/a.parquet#SHA256={digest.hexdigest().upper()}"))
            assert path.read_bytes() == BODY
            assert leftovers(folder) == ["a.parquet"]


def test_compressed_body_is_resumed_in_its_compression(tmp_path: Path) -> None:
    body = gzip.compress(BODY)
    coded = {"Content-Encoding": "gzip"}
    replies = [Reply(body, cut=500, headers=coded), Reply(body, headers=coded)]
    with DatasetServer({"/a.parquet": replies}) as server:
        assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY
        assert [request.get("range") for request in server.requests["/a.parquet"]] == [None, "bytes=500-"]


def test_range_of_another_representation_is_not_spliced(tmp_path: Path) -> None:
    replies = [Reply(gzip.compress(BODY), cut=500, headers={"Content-Encoding": "gzip"}), Reply(BODY)]
    with DatasetServer({"/a.parquet": [*replies, Reply(BODY)]}) as server:
        assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY


def test_coding_that_is_not_read_is_refused_before_its_body(tmp_path: Path) -> None:
    reply = Reply(BODY, headers={"Content-Encoding": "br"})
    with (
        DatasetServer({"/a.parquet": [reply]}) as server,
        pytest.raises(DataError, match=r"/a.parquet: sent in the coding 'br', .*only gzip, deflate, zstd"),
    ):
        get(tmp_path, server.url("/a.parquet"))
    assert leftovers(tmp_path) == []


def test_complete_part_of_an_earlier_run_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.part").write_bytes(BODY)
    (tmp_path / ".a.parquet.validator").write_text('"one"\n')
    end = Reply(status=416, headers={"Content-Range": f"bytes */{len(BODY)}"})
    with DatasetServer({"/a.parquet": [end]}) as server:
        assert get(tmp_path, server.url("/a.parquet")).read_bytes() == BODY


LIMITED = r"/a.jsonl: sends more than 100000 bytes \(97.7 KiB, all data together\), the limit that --max"
TOO_MUCH = {
    "length": Reply(b"{", length=100_001, cut=0),
    "chunked": Reply(b"{}\n" * 9000, length=None, endless=True),
    "gzip": Reply(gzip.compress(b"{}\n" * 40_000), headers={"Content-Encoding": "gzip"}),
    "zstd": Reply(zstd.compress(bytes(64 << 20)), headers={"Content-Encoding": "zstd"}),
}


@pytest.mark.parametrize("reply", TOO_MUCH.values(), ids=TOO_MUCH)
def test_downloads_end_at_the_limit(tmp_path: Path, reply: Reply) -> None:
    with (
        DatasetServer({"/a.jsonl": [reply]}) as server,
        pytest.raises(DataError, match=LIMITED),
    ):
        get(tmp_path, server.url("/a.jsonl"), max_bytes=100_000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 200_000


def test_limit_is_for_all_files_and_those_of_earlier_runs(tmp_path: Path) -> None:
    with DatasetServer({"/a.jsonl": [Reply(b"{}\n" * 200)], "/b.jsonl": [Reply(b"{}\n" * 200)]}) as server:
        urls = [server.url("/a.jsonl"), server.url("/b.jsonl")]
        get(tmp_path, urls[0], max_bytes=1000)
        with pytest.raises(DataError, match=r"/b.jsonl: sends more than 1000 bytes"):
            get(tmp_path, *urls, max_bytes=1000)
        get(tmp_path, *urls, max_bytes=1200)


def test_image_larger_than_the_limit_is_not_pulled(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(random.Random(1).randbytes(20_000))
    image = f"oci:{tmp_path}/layout:v1"
    oci.push(tmp_path / "rows", oci.parse(image))
    with pytest.raises(DataError, match=r"layout:v1: sends more than 10000 bytes"):
        fetch(DataSource(image=image, folder=tmp_path / "data", max_bytes=10_000))
    assert not (tmp_path / "data").exists()
    fetch(DataSource(image=image, folder=tmp_path / "data", max_bytes=30_000))
    assert (tmp_path / "data" / "image" / "a.jsonl").is_file()


def test_server_that_drips_over_many_connections_is_left(tmp_path: Path) -> None:
    """A byte a connection is no progress."""
    replies = [Reply(BODY, cut=1, silent_s=0.05) for _ in range(5)]
    with DatasetServer({"/a.parquet": [*replies, Reply(BODY)]}) as server:
        with pytest.raises(TransientError, match="gave up after 3 tries"):
            get(tmp_path, server.url("/a.parquet"))
        assert len(server.requests["/a.parquet"]) == 3


def test_redirect_without_a_place_is_one_line(tmp_path: Path) -> None:
    with (
        DatasetServer({"/a.parquet": [Reply(status=304)]}) as server,
        pytest.raises(DataError, match="answered 304, expected the file"),
    ):
        get(tmp_path, server.url("/a.parquet"))
