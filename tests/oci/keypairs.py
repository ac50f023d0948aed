"""Key pairs as cosign, OpenSSL and skopeo make them, encrypted or not."""

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.poly1305 import Poly1305

from runtime.oci import secretbox


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path


def make_pair(folder: Path, *, password: str = "", form: str = "") -> KeyPair:
    """Write cosign.key and cosign.pub; with `form` (SIGSTORE, COSIGN) the key is encrypted as cosign does."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    if form:
        der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, plain)
        text = armoured(der, password.encode(), form)
    else:
        how = serialization.BestAvailableEncryption(password.encode()) if password else plain
        pkcs8 = serialization.PrivateFormat.PKCS8
        text = key.private_bytes(serialization.Encoding.PEM, pkcs8, how).decode()
    pair = KeyPair(folder / "cosign.key", folder / "cosign.pub")
    pair.private.write_text(text)
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    pair.public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, info))
    return pair


def armoured(der: bytes, password: bytes, form: str, **params: int) -> str:
    """Encrypt a key as go-securesystemslib does: scrypt, then NaCl's secretbox, in JSON."""
    salt, nonce = os.urandom(32), os.urandom(24)
    cost = {"N": 32768, "r": 8, "p": 1} | params
    key = hashlib.scrypt(password, salt=salt, n=32768, r=8, p=1, maxmem=1 << 26, dklen=32)
    kdf = {"name": "scrypt", "params": cost, "salt": base64.b64encode(salt).decode()}
    cipher = {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()}
    hidden = base64.b64encode(boxed(der, nonce, key)).decode()
    document = json.dumps({"kdf": kdf, "cipher": cipher, "ciphertext": hidden}).encode()
    lines = base64.encodebytes(document).decode()
    return (
        f"-----BEGIN ENCRYPTED {form} PRIVATE KEY-----\n{lines}-----END ENCRYPTED {form} PRIVATE KEY-----\n"
    )


def boxed(data: bytes, nonce: bytes, key: bytes) -> bytes:
    stream = secretbox._stream(key, nonce, 32 + len(data))
    hidden = bytes(a ^ b for a, b in zip(data, stream[32:], strict=True))
    return Poly1305.generate_tag(stream[:32], hidden) + hidden
