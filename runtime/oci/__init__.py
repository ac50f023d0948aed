"""Images in registries and in layouts on disk: push and pull. The only importer of `oras`.

`oras` and `requests` are imported when a registry is first contacted, never by `import runtime.oci`.
Start at images.py.
"""

from runtime.oci import checkpoints, referrers, signatures
from runtime.oci.access import Access, AzureIdentity, from_environment
from runtime.oci.images import (
    ImageInfo,
    check_push,
    find_digest,
    inspect,
    pull,
    push,
    push_image,
    read_keys,
    sign,
    verify,
)
from runtime.oci.keys import SigningKey, VerificationKey, read_private, read_public
from runtime.oci.reference import Reference, below, is_image, is_path, parse, parse_repository
from runtime.oci.store import AccessDeniedError, Watch

__all__ = [
    "Access",
    "AccessDeniedError",
    "AzureIdentity",
    "ImageInfo",
    "Reference",
    "SigningKey",
    "VerificationKey",
    "Watch",
    "below",
    "check_push",
    "checkpoints",
    "find_digest",
    "from_environment",
    "inspect",
    "is_image",
    "is_path",
    "parse",
    "parse_repository",
    "pull",
    "push",
    "push_image",
    "read_keys",
    "read_private",
    "read_public",
    "referrers",
    "sign",
    "signatures",
    "verify",
]
