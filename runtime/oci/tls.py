"""Which certificates are trusted: a CA file, the environment's, a host's own in certs.d, or the system's.

A file that is named and cannot be used is a mistake in the configuration, found before anything is sent.
Start at `context`.
"""

import contextlib
import re
import ssl
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import requests

from runtime.errors import ConfigError
from runtime.oci.access import Access

_HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+")
"""A certificate's name in a folder that OpenSSL searches by itself."""


def context(access: Access, host: str) -> ssl.SSLContext:
    """Return the TLS settings for `host`; ConfigError names a file of certificates that cannot be used.

    Reading the system's certificates takes a tenth of a second, so they are read again only where a file
    that is named has changed.
    """
    named = [path for path in (access.ca_file, *access.ca_paths) if path is not None]
    folders = [folder / host for folder in access.host_certificates]
    return _made(access, host, tuple(_states([*named, *folders])))


def _states(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Yield when each of `paths`, and what lies in it, has last changed."""
    for path in paths:
        with contextlib.suppress(OSError):
            yield path, path.stat().st_mtime_ns
            if path.is_dir():
                yield from ((entry, entry.stat().st_mtime_ns) for entry in sorted(path.iterdir()))


@lru_cache(maxsize=32)
def _made(access: Access, host: str, states: tuple[tuple[Path, int], ...]) -> ssl.SSLContext:
    """Return the settings; `states` are those of the files that are named, to tell old ones by."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.insecure:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif trusted := [path for path in (access.ca_file, *access.ca_paths) if path is not None]:
        for path in trusted:
            _trust(made, path)
    else:
        made.load_default_certs()
        made.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    for folder in access.host_certificates:
        _use_host_folder(made, folder / host)
    return made


def _trust(made: ssl.SSLContext, path: Path) -> None:
    """Trust the certificates in a file or a folder."""
    try:
        if not path.is_dir():
            made.load_verify_locations(path)
        elif any(_HASHED.fullmatch(entry.name) for entry in path.iterdir()):
            made.load_verify_locations(capath=path)
        else:
            for entry in sorted(path.iterdir()):
                if entry.is_file():
                    made.load_verify_locations(entry)
    except ssl.SSLError:
        raise ConfigError(f"CA certificates {path}: no certificate in PEM form in it") from None
    except OSError as error:
        raise ConfigError(f"CA certificates {path}: cannot be read ({error.strerror})") from None


def _use_host_folder(made: ssl.SSLContext, folder: Path) -> None:
    """Take a host's own CAs (*.crt) and client certificates (*.cert beside *.key), as Docker does."""
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError:  # another user's folder: its host may need nothing from it
        return
    for entry in entries:
        if entry.suffix == ".crt":
            _trust(made, entry)
        elif entry.suffix == ".cert":
            try:
                made.load_cert_chain(entry, entry.with_suffix(".key"))
            except (OSError, ssl.SSLError) as error:
                reason = error.strerror or "not a certificate and its key"
                raise ConfigError(
                    f"client certificate {entry}: cannot be used with {entry.stem}.key beside it ({reason})"
                ) from None
