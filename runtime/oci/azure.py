"""Log in to an Azure registry as the pod itself: workload identity or managed identity.

Two plain HTTP exchanges (identity -> Entra token -> registry refresh token), so no SDK is needed.
Both tokens are fetched at each use: the federated token file is replaced by Kubernetes every hour.
Start at `refresh_token`.
"""

from collections.abc import Callable, Mapping

import requests

from runtime.errors import ConfigError, RegistryError, TransientError
from runtime.net import RetriableError
from runtime.oci.access import AzureIdentity
from runtime.oci.credentials import NULL_GUID, Credential
from runtime.oci.responses import raise_if_busy
from runtime.oci.transport import Outgoing, Transport

_AUTHORITY = "https://login.microsoftonline.com/"
_AUDIENCE = "https://containerregistry.azure.net"
_PROBE_TIMEOUT_S = (2.0, 10.0)
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def refresh_token(identity: AzureIdentity, transport: Transport) -> Credential:
    """Return the registry refresh token of `identity` (lives about 3 hours).

    Raises RegistryError when it is refused, TransientError when its service does not answer, as on a machine
    that is not Azure's.
    """
    token = (
        _workload_token(identity, transport) if identity.token_file else _managed_token(identity, transport)
    )
    name = f"Azure identity {identity.client_id or 'of this node'}"
    form = {"grant_type": "access_token", "service": transport.host, "access_token": token}
    if identity.tenant_id:
        form["tenant"] = identity.tenant_id
    url = f"{transport.base}oauth2/exchange"
    secret = _field("refresh_token", transport, name, lambda: transport.log_in_at(url, form=form))
    return Credential(NULL_GUID, secret, "identity", name)


def _workload_token(identity: AzureIdentity, transport: Transport) -> str:
    if not identity.client_id or not identity.tenant_id or not identity.token_file:
        raise ConfigError(
            "workload identity needs AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_FEDERATED_TOKEN_FILE"
        )
    try:
        assertion = identity.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{identity.token_file}: the federated token cannot be read ({reason})") from None
    form = {
        "grant_type": "client_credentials",
        "client_id": identity.client_id,
        "scope": f"{_AUDIENCE}/.default",
        "client_assertion_type": _ASSERTION,
        "client_assertion": assertion,
    }
    url = f"{(identity.authority or _AUTHORITY).rstrip('/')}/{identity.tenant_id}/oauth2/v2.0/token"
    name = f"workload identity {identity.client_id}"
    return _field("access_token", transport, name, lambda: transport.log_in_at(url, form=form))


def _managed_token(identity: AzureIdentity, transport: Transport) -> str:
    """Return the token of the identity with this client id, or of the one that the node itself has."""
    query = f"api-version=2018-02-01&resource={_AUDIENCE}"
    if identity.client_id:
        query += f"&client_id={identity.client_id}"
    url = f"{identity.metadata}/metadata/identity/oauth2/token?{query}"
    request = Outgoing("GET", url, {"Metadata": "true"})
    if identity.client_id:
        return _field("access_token", transport, "managed identity", lambda: transport.plain(request))
    name = "system-assigned identity"
    try:  # it need not exist: one short try
        response = transport.plain(request, timeout=_PROBE_TIMEOUT_S)
        raise_if_busy(response)
    except RetriableError as error:
        raise TransientError(f"{name}: the metadata service gave no token ({error})") from None
    return _read_field("access_token", response, transport, name)


def _field(wanted: str, transport: Transport, name: str, ask: Callable[[], requests.Response]) -> str:
    """Return field `wanted` of what `ask` gets, asking again while the service is busy."""
    retries = transport.retries(f"log in as {name}")
    while True:
        try:
            response = ask()
            raise_if_busy(response)
            break
        except RetriableError as error:
            retries.failed(error)
    return _read_field(wanted, response, transport, name)


def _read_field(wanted: str, response: requests.Response, transport: Transport, name: str) -> str:
    try:
        reply: Mapping[str, object] = response.json()
        if response.status_code == 200:
            return str(reply[wanted])
        # Entra's description ends in trace ids over several lines; its first line has the reason.
        reason = str(reply.get("error_description") or reply.get("error") or "").split("\n")[0][:200]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        reason = "no token in the reply"
    raise RegistryError(
        f"{transport.host}: {name} was refused ({response.status_code} {reason}); check its role"
    )
