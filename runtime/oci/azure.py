"""Log in to an Azure registry as the pod itself: workload identity or managed identity.

Two plain HTTP exchanges (identity -> Entra token -> registry refresh token), so no SDK is needed.
Both tokens are fetched at each use: the federated token file is replaced by Kubernetes every hour.
Start at `refresh_token`.
"""

from collections.abc import Mapping

from runtime.errors import ConfigError, RegistryError
from runtime.net import RetriableError
from runtime.oci.access import AzureIdentity
from runtime.oci.credentials import NULL_GUID, Credential
from runtime.oci.transport import Transport, raise_if_busy

_AUTHORITY = "https://login.microsoftonline.com/"
_AUDIENCE = "https://containerregistry.azure.net"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def refresh_token(identity: AzureIdentity, transport: Transport) -> Credential:
    """Return the registry refresh token of `identity` (lives about 3 hours)."""
    token = (
        _workload_token(identity, transport) if identity.token_file else _managed_token(identity, transport)
    )
    name = f"Azure identity {identity.client_id or 'of this node'}"
    form = {"grant_type": "access_token", "service": transport.host, "access_token": token}
    if identity.tenant_id:
        form["tenant"] = identity.tenant_id
    url = f"{transport.prefix}://{transport.host}/oauth2/exchange"
    return Credential(NULL_GUID, _post(transport, url, form, "refresh_token", name), "identity", name)


def _workload_token(identity: AzureIdentity, transport: Transport) -> str:
    if not identity.client_id or not identity.tenant_id or not identity.token_file:
        raise ConfigError(
            "workload identity needs AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_FEDERATED_TOKEN_FILE"
        )
    try:
        assertion = identity.token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"{identity.token_file}: the federated token cannot be read ({error.strerror})"
        ) from None
    form = {
        "grant_type": "client_credentials",
        "client_id": identity.client_id,
        "scope": f"{_AUDIENCE}/.default",
        "client_assertion_type": _ASSERTION,
        "client_assertion": assertion,
    }
    url = f"{(identity.authority or _AUTHORITY).rstrip('/')}/{identity.tenant_id}/oauth2/v2.0/token"
    return _post(transport, url, form, "access_token", f"workload identity {identity.client_id}")


def _managed_token(identity: AzureIdentity, transport: Transport) -> str:
    query = f"api-version=2018-02-01&resource={_AUDIENCE}"
    if identity.client_id:
        query += f"&client_id={identity.client_id}"
    url = f"{identity.metadata}/metadata/identity/oauth2/token?{query}"
    return _post(transport, url, None, "access_token", "managed identity")


def _post(transport: Transport, url: str, form: Mapping[str, str] | None, wanted: str, name: str) -> str:
    """Return field `wanted` of the reply to `form`; None sends a GET (the node's metadata service)."""
    retries = transport.retries(f"log in as {name}")
    while True:
        try:
            if form is None:
                response = transport.plain("GET", url, headers={"Metadata": "true"})
            else:
                response = transport.plain("POST", url, data=form)
            raise_if_busy(response)
            break
        except RetriableError as error:
            retries.failed(error)
    try:
        reply = response.json()
        if response.status_code == 200:
            return str(reply[wanted])
        # Entra's description ends in trace ids over several lines; its first line has the reason.
        reason = str(reply.get("error_description") or reply.get("error") or "").split("\n")[0][:200]
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "no token in the reply"
    raise RegistryError(
        f"{transport.host}: {name} was refused ({response.status_code} {reason}); check its role"
    )
