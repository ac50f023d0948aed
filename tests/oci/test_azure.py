"""Logging in as a pod's own identity (fault test 34), at a registry that does as Azure's."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError
from runtime.oci import AzureIdentity, from_environment
from tests.oci.conftest import AzureLike, docker_config, fresh, quick

pytestmark = pytest.mark.system


def test_34_workload_identity_logs_in_and_rereads_its_token(azure: AzureLike, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    identity = AzureIdentity(
        client_id="client-1",
        tenant_id="tenant-1",
        token_file=token_file,
        authority=f"http://{azure.host}",
        registries=("127.0.0.1:*",),
    )
    for turn in ("federated-1", "federated-2"):  # Kubernetes replaces the file every hour
        azure.tokens.federated = turn
        token_file.write_text(turn)
        azure.tokens.grants.clear()
        oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
        assert azure.tokens.grants[:3] == ["federated", "exchange", "refresh"]
    token_file.write_text("stale")
    with pytest.raises(RegistryError, match=r"identity client-1 was refused.*AADSTS700024") as caught:
        oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
    assert "stale" not in str(caught.value)


def test_34_managed_identity_logs_in(azure: AzureLike) -> None:
    identity = AzureIdentity(metadata=f"http://{azure.host}", registries=("127.0.0.1:*",))
    oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
    assert azure.tokens.grants[:3] == ["metadata", "exchange", "refresh"]


def test_identity_is_shown_to_azure_registries_alone(azure: AzureLike) -> None:
    identity = AzureIdentity(metadata=f"http://{azure.host}")
    with pytest.raises(RegistryError):
        oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
    assert "metadata" not in azure.tokens.grants


def test_workload_identity_without_its_variables_is_reported(azure: AzureLike, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    identity = AzureIdentity(client_id="c", token_file=tmp_path / "token", registries=("127.0.0.1:*",))
    with pytest.raises(ConfigError, match="AZURE_TENANT_ID"):
        oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))


def test_system_assigned_identity_needs_no_variable(azure: AzureLike) -> None:
    """As a pod without any Azure variable has it; the metadata service is a stand-in."""
    identity = from_environment({}).azure
    assert identity is not None
    identity = replace(identity, metadata=f"http://{azure.host}", registries=("127.0.0.1:*",))
    oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
    assert azure.tokens.grants[:3] == ["metadata", "exchange", "refresh"]


@pytest.mark.parametrize("answer", [None, 404, 400, 503])
def test_machine_without_an_identity_goes_on_without(
    azure: AzureLike, adapter: Path, tmp_path: Path, answer: int | None
) -> None:
    """Public images can be pulled anywhere; a push says what was tried, at once."""
    reference = fresh(azure.host, "public")
    oci.push(adapter, reference, access=quick(docker_config(tmp_path / "config.json", azure.host)))
    metadata = "http://127.0.0.1:1"
    if answer is not None:
        metadata = f"http://{azure.host}"
        azure.front.fault("GET", "/metadata/", "status", status=answer, times=99)
    access = quick(azure=AzureIdentity(metadata=metadata, registries=("127.0.0.1:*",)))
    oci.pull(reference, tmp_path / "back", access=access)
    began = time.monotonic()
    with pytest.raises(RegistryError, match="system-assigned identity"):
        oci.check_push(reference, access=access)
    assert time.monotonic() - began < 15  # 1


@pytest.mark.parametrize("authority", ["http://login.example.com", "https://169.254.169.254"])
def test_federated_token_goes_to_a_safe_authority_only(
    azure: AzureLike, tmp_path: Path, authority: str
) -> None:
    (tmp_path / "token").write_text("federated-1")
    identity = AzureIdentity(
        client_id="client-1",
        tenant_id="tenant-1",
        token_file=tmp_path / "token",
        authority=authority,
        registries=("127.0.0.1:*",),
    )
    with pytest.raises(RegistryError, match=r"plain HTTP|metadata address"):
        oci.check_push(fresh(azure.host, "a"), access=quick(azure=identity))
