"""Where credentials and caches are, by the environment."""

from pathlib import Path

from runtime.oci import from_environment
from runtime.oci.access import credential_files


def test_environment_names_the_files_in_order(tmp_path: Path) -> None:
    environment = {
        "HOME": "/home/me",
        "DOCKER_CONFIG": "/etc/docker-login",
        "REGISTRY_AUTH_FILE": "/run/auth.json",
        "AZURE_CLIENT_ID": "client",
        "AZURE_TENANT_ID": "tenant",
        "AZURE_FEDERATED_TOKEN_FILE": "/var/run/token",
    }
    access = from_environment(environment, files=[tmp_path])
    files = [str(file) for file in access.files or ()]
    assert files[:4] == [
        str(tmp_path),
        "/run/auth.json",
        "/etc/docker-login",
        "/home/me/.docker/config.json",
    ]
    assert {"/root/.docker/config.json", "/tmp/.docker/config/config.json", "/root/.docker/config.d"} <= {
        *files
    }
    assert access.azure is not None
    assert access.azure.token_file == Path("/var/run/token")


def test_a_mounted_secret_is_called_so_wherever_the_home_is() -> None:
    files = credential_files({"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0"})
    assert len({file.path for file in files}) == len(files)
    origins = {str(file.path): file.origin for file in files}
    assert origins["/root/.docker/config.json"] == "mounted secret"
    assert origins["/root/.config/containers/auth.json"] == "podman login"
    assert origins["/run/user/0/containers/auth.json"] == "podman login"


def test_uploads_are_remembered_only_in_a_folder_of_the_users() -> None:
    assert from_environment({"HOME": "/home/me"}).sessions == Path(
        "/home/me/.cache/workspace-runtime/uploads"
    )
    assert from_environment({"RUNTIME_CACHE": "/cache/rt"}).sessions == Path("/cache/rt/uploads")
    assert from_environment({}).sessions is None
