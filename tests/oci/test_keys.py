"""Key files of OpenSSL and cosign, plain and encrypted; what is no key for images is refused by name."""

import subprocess
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.oci.keys import SigningKey, read_private, read_public
from tests.oci.conftest import needs
from tests.oci.keypairs import armoured, make_pair


def check(key: SigningKey, public: Path) -> None:
    assert read_public(str(public)).verifies(b"data", key.sign(b"data"))
    assert not read_public(str(public)).verifies(b"date", key.sign(b"data"))


@pytest.mark.parametrize(
    ("password", "form"), [("", ""), ("pä ss", ""), ("pä ss", "SIGSTORE"), ("", "COSIGN")]
)
def test_key_is_read_with_its_passphrase(password: str, form: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, password=password, form=form)
    check(read_private(pair.private, password), pair.public)
    if password:
        with pytest.raises(ConfigError, match="COSIGN_PASSWORD is not its passphrase"):
            read_private(pair.private, "wrong")
        with pytest.raises(ConfigError, match="COSIGN_PASSWORD"):
            read_private(pair.private)
    elif not form:
        check(read_private(pair.private, "not needed"), pair.public)


@needs("openssl")
def test_key_is_read_as_openssl_writes_it(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-out", private], check=True)
    subprocess.run(
        ["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True
    )
    check(read_private(private), public)
    encrypted = tmp_path / "encrypted.pem"
    hide = ["openssl", "ec", "-in", private, "-aes256", "-passout", "pass:x1x1", "-out", encrypted]
    subprocess.run(hide, check=True, capture_output=True)
    check(read_private(encrypted, "x1x1"), public)


def test_signature_is_the_same_each_time(tmp_path: Path) -> None:
    key = read_private(make_pair(tmp_path).private)
    assert key.sign(b"data") == key.sign(b"data")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"], "a key of another kind"),
        (["genpkey", "-algorithm", "ed25519"], "a key of another kind"),
        (["ecparam", "-name", "secp384r1", "-genkey", "-noout"], "a key of another kind"),
        (["rand", "-base64"], "no private key in PEM form"),
        (["rand"], "more than 64 KiB"),
    ],
    ids=["rsa", "ed25519", "p-384", "none", "large"],
)
@needs("openssl")
def test_other_files_are_refused_by_name(make: list[str], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    size = ["70000"] if make == ["rand"] else ["40"] if make[0] == "rand" else []
    subprocess.run(["openssl", *make, "-out", path, *size], check=True, capture_output=True)
    with pytest.raises(ConfigError, match=rf"{path}: {expected}"):
        read_private(path)


def test_a_private_key_is_not_taken_for_the_public_one(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    with pytest.raises(ConfigError, match="a private key, expected the public one"):
        read_public(str(pair.private))
    with pytest.raises(ConfigError, match="no private key in PEM form"):
        read_private(pair.public)
    with pytest.raises(ConfigError, match="no public key in PEM form"):
        read_public("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")


@pytest.mark.parametrize("params", [{"N": 1 << 30}, {"r": 1 << 20}, {"N": "many"}, {"p": -1}, {"N": 3}])
def test_passphrase_that_costs_all_memory_is_not_tried(params: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "cosign.key"
    path.write_text(armoured(b"x" * 138, b"", "SIGSTORE", **params))
    with pytest.raises(ConfigError, match=r"bytes of memory to try|no private key"):
        read_private(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"kdf": 1, "cipher": 2}', "[" * 5000])
def test_armour_around_anything_else_is_no_key(text: str, tmp_path: Path) -> None:
    import base64

    path = tmp_path / "cosign.key"
    kind = "ENCRYPTED SIGSTORE PRIVATE KEY"
    hidden = base64.b64encode(text.encode()).decode()
    path.write_text(f"-----BEGIN {kind}-----\n{hidden}\n-----END {kind}-----\n")
    with pytest.raises(ConfigError, match="no private key"):
        read_private(path, "x")
