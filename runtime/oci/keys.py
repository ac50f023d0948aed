"""Keys that sign images and that verify signatures: ECDSA on P-256, in PEM files as cosign and OpenSSL write.

The only importer of `cryptography`, which is loaded when a key is first read. Does not know images.
Start at `read_private` and `read_public`.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError
from runtime.oci.access import KEY_PASSWORD
from runtime.oci.secretbox import open_box

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_MOST_BYTES = 64 << 10
_MOST_SCRYPT_BYTES = 512 << 20
_SIGSTORE = re.compile(
    r"-----BEGIN ENCRYPTED (SIGSTORE|COSIGN) PRIVATE KEY-----\s(.+?)-----END ENCRYPTED \1 PRIVATE KEY-----",
    re.DOTALL,
)
_MAKE = "as `cosign generate-key-pair` or `openssl ecparam -name prime256v1 -genkey` makes them"


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key."""

    name: str
    """The file that it is from."""
    id: str
    """SHA-256 of its DER form, 64 hex digits: what tells it from other keys."""
    _key: "ec.EllipticCurvePublicKey"

    def verifies(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` (DER) is this key's over `data`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            self._key.verify(signature, data, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key with its public one."""

    public: VerificationKey
    _key: "ec.EllipticCurvePrivateKey"

    def sign(self, data: bytes) -> bytes:
        """Return the signature (DER) of `data`, always the same (RFC 6979): a push again changes nothing."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA256

        return self._key.sign(data, ec.ECDSA(SHA256(), deterministic_signing=True))


def read_public(key: str) -> VerificationKey:
    """Return the public key `key`, a file or PEM text; ConfigError for anything else."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    is_text = "-----BEGIN" in key
    name = "the given key" if is_text else key
    data = key.encode() if is_text else _read(Path(key), "public key")
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{name}: a private key, expected the public one; keep the private one to sign with"
        )
    try:
        found: Any = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{name}: no public key in PEM form; expected one of ECDSA P-256, {_MAKE}"
        ) from None
    return _public(found, name)


def read_private(path: Path, password: str | None = None) -> SigningKey:
    """Return the private key in the file `path`; ConfigError when it is none or `password` is not its own.

    In PEM form, plain or encrypted, or as cosign encrypts it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = _read(path, "private key")
    secret = password.encode() if password else None
    try:
        if own := _SIGSTORE.search(data.decode("ascii", "replace")):
            der = _decrypted(own[2], path, secret or b"")
            key: Any = serialization.load_der_private_key(der, None)
        else:
            encrypted = b"ENCRYPTED" in data  # a password that no key needs is no mistake
            if encrypted and secret is None:
                raise ConfigError(f"{path}: is encrypted; put its passphrase into {KEY_PASSWORD}")
            key = serialization.load_pem_private_key(data, secret if encrypted else None)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, UnsupportedAlgorithm):
        wrong = f", or {KEY_PASSWORD} is not its passphrase" if secret else ""
        raise ConfigError(
            f"{path}: no private key in PEM form{wrong}; expected ECDSA P-256, {_MAKE}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _other_kind(str(path))
    return SigningKey(_public(key.public_key(), str(path)), key)


def _public(found: Any, name: str) -> VerificationKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name != "secp256r1":
        raise _other_kind(name)
    der = found.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return VerificationKey(name, hashlib.sha256(der).hexdigest(), found)


def _other_kind(name: str) -> ConfigError:
    return ConfigError(f"{name}: a key of another kind, expected ECDSA on P-256, {_MAKE}")


def _decrypted(text: str, path: Path, password: bytes) -> bytes:
    """Return the DER key in cosign's encrypted form: JSON with scrypt's parameters and a secret box."""
    box = json.loads(base64.b64decode("".join(text.split()), validate=True))
    kdf, cipher = box["kdf"], box["cipher"]
    if (kdf["name"], cipher["name"]) != ("scrypt", "nacl/secretbox"):
        raise ConfigError(f"{path}: encrypted in a way that is not known here; expected scrypt and secretbox")
    cost, block, lanes = (kdf["params"][name] for name in ("N", "r", "p"))
    needed = 128 * block * (cost + lanes + 2)
    if needed > _MOST_SCRYPT_BYTES:
        raise ConfigError(f"{path}: its passphrase takes {needed} bytes of memory to try; refused")
    salt, nonce, hidden = (
        base64.b64decode(each) for each in (kdf["salt"], cipher["nonce"], box["ciphertext"])
    )
    key = hashlib.scrypt(
        password, salt=salt, n=cost, r=block, p=lanes, maxmem=_MOST_SCRYPT_BYTES + (1 << 20), dklen=32
    )
    if len(nonce) != 24:
        raise ValueError(nonce)
    opened = open_box(hidden, nonce=nonce, key=key)
    if opened is None:
        raise ConfigError(f"{path}: {KEY_PASSWORD} is not its passphrase")
    return opened


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a {what} in PEM form") from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_BYTES >> 10} KiB, expected a {what} in PEM form")
    return data
