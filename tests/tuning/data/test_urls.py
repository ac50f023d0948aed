"""Addresses of data files, as far as their text tells."""

import pytest

from runtime.errors import ConfigError
from runtime.tuning.data.urls import parse, shown, unsigned

DIGEST = "0a" * 32


@pytest.mark.parametrize(
    "fragment", [f"sha256={DIGEST}", f"SHA256={DIGEST}", f"sha256:{DIGEST.upper()}", f"sha-256={DIGEST}"]
)
def test_digests_are_read_in_every_spelling(fragment: str) -> None:
    url = parse(f"https://h/a.csv?sig=1#{fragment}")
    assert (url.url, url.sha256) == ("https://h/a.csv?sig=1", DIGEST)


def test_no_fragment_is_no_digest() -> None:
    assert parse("https://h/a.csv").sha256 is parse("https://h/a.csv#").sha256 is None


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("sha256=00", "its sha256 has 2 digits"),
        ("sha256=", "its sha256 has 0 digits"),
        (f"sha256={DIGEST}0", "its sha256 has 65 digits"),
        (f"md5={DIGEST[:32]}", "what follows '#' is no digest"),
        (DIGEST, "what follows '#' is no digest"),
        ("sha256=" + "z" * 64, "what follows '#' is no digest"),
        ("access_token=topsecret", "what follows '#' is no digest"),
    ],
)
def test_other_fragments_are_refused_with_the_right_form(fragment: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"https://u:pw@h/a.csv?sig=topsecret#{fragment}")
    assert str(caught.value).startswith(f"https://h/a.csv: {problem}, expected #sha256= and 64 hexadecimal")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.254.169.254.",
        "[::ffff:a9fe:a9fe]",
        "u:p@169.254.169.254",
        "a@b@169.254.169.254",
        "169。254。169。254",
        "metadata.google.internal",
        "100.64.3.2:8080",
    ],
)
def test_what_is_never_fetched_is_told_by_its_text(host: str) -> None:
    with pytest.raises(ConfigError, match=r"address.*; it is never fetched"):
        parse(f"HTTP://{host}/latest")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://h/a", "only http and https"),
        ("http:///x", "only http and https"),
        ("//h/a", "only http and https"),
        ("http://x:99999/", "not a valid address"),
        ("http://x:0/", "not a valid address"),
        ("http://[bad/", "not a valid address"),
        ("http://127.0.0.1\\@h/", "not a valid address"),
        ("http://169.254.169.254%2f.h/", "not a valid address"),
    ],
)
def test_what_is_no_address_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(url)


def test_secrets_are_not_shown() -> None:
    assert shown("https://u:p@h:8/a?sig=1#x") == "https://h:8/a"
    assert shown("http://[bad") == "a malformed address"


SAS = "sv=2024-11-04&se=2026-12-01T00%3A00%3A00Z&sr=b&sp=r&sig={0}"
S3 = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20261130T00{0}Z&X-Amz-Expires=3600&X-Amz-Signature={0}"
GCS = "X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential=a%40b&X-Goog-Date={0}&X-Goog-Signature={0}"
OLDER = "AWSAccessKeyId=AKIA{0}&Expires=17{0}&Signature=a%2F{0}%3D"
OSS = "x-oss-credential=c&x-oss-date={0}&x-oss-expires=600&x-oss-signature-version=OSS4&x-oss-signature={0}"


@pytest.mark.parametrize("signature", [SAS, S3, GCS, OLDER, OSS], ids=["Azure", "S3", "GCS", "S3 v2", "OSS"])
def test_address_is_the_same_when_its_signature_is_renewed(signature: str) -> None:
    first, renewed = (
        f"https://u:{key}@host.test/c/rows.parquet?versionId=7&{signature.format(key)}"
        for key in ("11", "22")
    )
    assert unsigned(first) == unsigned(renewed) == "https://u@host.test/c/rows.parquet?versionId=7"
    assert unsigned("https://token@host.test/a") == "https://host.test/a"
    assert parse(first).identity == parse(renewed).identity
    assert parse(first).url == first  # what is fetched keeps it


@pytest.mark.parametrize(
    "url",
    [
        "https://host.test/rows.csv?se=north&sp=2",  # without a signature these are the server's own
        "https://host.test/export?format=csv&expires=never&policy=old",
        "https://host.test/a%20b?x-oss-process=image&id=7",
        "https://host.test/export?st=train&sp=2&sig=7",  # nor with a field that is called like one
        "https://host.test/export?policy=old&expires=never&signature=7",
    ],
)
def test_other_queries_tell_addresses_apart(url: str) -> None:
    assert unsigned(url) == url


def test_users_of_a_server_have_data_of_their_own() -> None:
    mine, others = (f"https://{user}:pw@host.test/export.jsonl" for user in ("ann", "ben"))
    assert parse(mine).identity != parse(others).identity
