"""How to reach a registry: where credentials are, which certificates to trust, whether plain HTTP is allowed.

Plain values; reads no file (credentials.py does) and not the environment, which callers pass in. Start at
`from_environment`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.files import cache_folder

MOUNTED_SECRETS = Path("/root/.docker/config.d")
"""Folder of mounted secrets, one file each: newer controllers', and that of `runtime manifest`."""
MOUNTED = (
    Path("/root/.docker/config.json"),
    Path("/tmp/.docker/config/config.json"),  # noqa: S108 - where controllers v0.3.1 to v0.4.4 mount the secret
    MOUNTED_SECRETS,
)
"""Where the controller's versions mount `imagePushSecret` and the adapters' `imagePullSecrets`."""
HOST_CERTIFICATES = (Path("/etc/docker/certs.d"), Path("/etc/containers/certs.d"))
"""Folders with a folder of certificates per registry, `HOST[:PORT]/*.crt`, as Docker and podman read them."""
REQUIRE_SIGNATURE = "RUNTIME_REQUIRE_SIGNATURE"
"""Variable with the keys of `Access.required_keys`: paths with a colon between them, or PEM text."""
KEY_PASSWORD = "COSIGN_PASSWORD"  # noqa: S105 - its name
"""Variable with `Access.key_password`, cosign's own."""
_USER_CERTIFICATES = (".docker/certs.d", ".config/containers/certs.d")


@dataclass(frozen=True, slots=True)
class CredentialFile:
    """A Docker config.json, or a folder of them."""

    path: Path
    origin: str
    """Who writes it, for messages."""


@dataclass(frozen=True, slots=True)
class AzureIdentity:
    """A pod's own identity (workload identity, or the managed identity of its node)."""

    client_id: str | None = None
    """AZURE_CLIENT_ID; None asks for the node's system-assigned identity, which it need not have."""
    tenant_id: str | None = None
    """AZURE_TENANT_ID."""
    token_file: Path | None = None
    """AZURE_FEDERATED_TOKEN_FILE; Kubernetes replaces its content, so it is read at every use."""
    authority: str | None = None
    """AZURE_AUTHORITY_HOST, for clouds other than the public one."""
    metadata: str = "http://169.254.169.254"
    """The node's metadata service, which gives managed identities their tokens."""
    registries: tuple[str, ...] = ("*.azurecr.io", "*.azurecr.cn", "*.azurecr.us")
    """Hosts that the identity is used for, and no others."""


@dataclass(frozen=True, slots=True)
class Access:
    """Credentials and transport settings for registries; the default reads the usual Docker files."""

    files: tuple[Path, ...] | None = None
    """Docker `config.json` files, or folders of them, in the order to try; None means the default ones."""
    azure: AzureIdentity | None = None
    """Identity to log in with at `*.azurecr.io` when no file has credentials for it."""
    insecure: bool = False
    """Allow plain HTTP, and HTTPS without checking the certificate."""
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    ca_paths: tuple[Path, ...] = ()
    """More of them, files and folders: what the environment names."""
    host_certificates: tuple[Path, ...] = HOST_CERTIFICATES
    """Folders with certificates for one registry each, trusted in addition."""
    required_keys: tuple[str, ...] = ()
    """Public keys, files or PEM text, one of which must have signed what is pulled; () asks for none."""
    key_password: str | None = field(default=None, repr=False)
    """Passphrase of the private key that signs what is pushed."""
    cache: Path | None = None
    """Folder that keeps pulled blobs by digest; None keeps only what an interrupted pull needs."""
    sessions: Path | None = None
    """Folder for the addresses of open uploads, with which a killed push resumes inside a blob."""
    connect_timeout_s: float = 10.0
    """Seconds to wait for a connection."""
    read_timeout_s: float = 60.0
    """Seconds without one byte from the registry before the request counts as lost."""
    attempts: int = 6
    """Tries of one request, or of one chunk without progress, before giving up."""
    backoff_s: float = 0.5
    """First wait between tries; it doubles each time (runtime/net.py)."""

    def requiring(self, keys: Sequence[str]) -> "Access":
        """Return this access with `keys` required instead of the environment's, where there are any."""
        return replace(self, required_keys=tuple(keys)) if keys else self


DEFAULT = Access()
"""Credentials in the default locations, no exceptions to TLS."""


def from_environment(
    environment: Mapping[str, str],
    *,
    files: Sequence[Path] = (),
    insecure: bool = False,
    ca_file: Path | None = None,
    cache: Path | None = None,
) -> Access:
    """Return the access a process with this environment has; `files` are tried before all others."""
    # Never in a folder that all users share: an address that another one planted there would get the upload.
    private = any(environment.get(name) for name in ("RUNTIME_CACHE", "XDG_CACHE_HOME", "HOME"))
    return Access(
        files=tuple(dict.fromkeys([*files, *(file.path for file in credential_files(environment))])),
        azure=_azure_identity(environment),
        insecure=insecure,
        ca_file=ca_file,
        ca_paths=() if ca_file else _ca_paths(environment),
        host_certificates=(*HOST_CERTIFICATES, *(Path(home, name) for name in _USER_CERTIFICATES))
        if (home := environment.get("HOME"))
        else HOST_CERTIFICATES,
        required_keys=tuple(filter(None, environment.get(REQUIRE_SIGNATURE, "").split(os.pathsep))),
        key_password=environment.get(KEY_PASSWORD) or None,
        cache=cache,
        sessions=cache_folder(environment) / "uploads" if private else None,
    )


def _azure_identity(environment: Mapping[str, str]) -> AzureIdentity:
    token_file = environment.get("AZURE_FEDERATED_TOKEN_FILE")
    return AzureIdentity(
        client_id=environment.get("AZURE_CLIENT_ID") or None,
        tenant_id=environment.get("AZURE_TENANT_ID") or None,
        token_file=Path(token_file) if token_file else None,
        authority=environment.get("AZURE_AUTHORITY_HOST") or None,
    )


def _ca_paths(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files and folders of certificates that the variables of requests, curl and OpenSSL name."""
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    paths = [Path(environment[name]) for name in names if environment.get(name)]
    folders = [Path(folder) for folder in environment.get("SSL_CERT_DIR", "").split(":") if folder]
    # Lists of folders name those of several systems; one that is named alone has to be there.
    paths += [folder for folder in folders if folder.is_dir()] or folders[:1]
    return tuple(dict.fromkeys(paths))


def credential_files(environment: Mapping[str, str]) -> tuple[CredentialFile, ...]:
    """Return where a process with this environment may find registry credentials, in the order to try."""
    found = [
        CredentialFile(Path(environment[name]), f"environment {name}")
        for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG")
        if environment.get(name)
    ]
    if home := environment.get("HOME"):
        found += [
            CredentialFile(Path(home, ".docker/config.json"), "docker login"),
            CredentialFile(Path(home, ".docker/config.d"), "docker login"),
            CredentialFile(Path(home, ".config/containers/auth.json"), "podman login"),
        ]
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        found.append(CredentialFile(Path(runtime, "containers/auth.json"), "podman login"))
    by_path = {file.path: file for file in found}
    return tuple((by_path | {path: CredentialFile(path, "mounted secret") for path in MOUNTED}).values())


def default_credential_files() -> tuple[Path, ...]:
    """Return where Docker, podman and the controller store credentials for this user."""
    try:
        environment = {"HOME": str(Path.home())}
    except RuntimeError:  # a user id without a passwd entry and without HOME
        environment = {}
    return tuple(file.path for file in credential_files(environment))
