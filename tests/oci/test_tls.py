"""Certificates to trust: by file, folder, environment and host; mistakes in them are the configuration's."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError
from runtime.oci import from_environment, tls
from tests.faults.quirky_registry import QuirkyRegistry
from tests.faults.registry_tokens import make_certificate
from tests.oci.conftest import fresh, quick

Certificate = tuple[Path, Path]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "registry")


@pytest.fixture(scope="module")
def secure(certificate: Certificate) -> Iterator[QuirkyRegistry]:
    server = QuirkyRegistry(certificate=certificate)
    yield server
    server.stop()


def test_untrusted_certificate_is_reported_at_once(secure: QuirkyRegistry) -> None:
    with pytest.raises(RegistryError, match="certificate is not trusted"):
        oci.check_push(fresh(secure.host, "x"), access=quick())
    oci.check_push(fresh(secure.host, "x"), access=quick(insecure=True))


@pytest.mark.parametrize("way", ["file", "folder", "hashed folder", "certs.d"])
def test_certificates_are_trusted_by_file_folder_and_host(
    secure: QuirkyRegistry, certificate: Certificate, tmp_path: Path, way: str
) -> None:
    name = {"hashed folder": hash_name(certificate[0]), "file": "ca.pem"}.get(way, "ca.crt")
    folder = tmp_path / (secure.host if way == "certs.d" else "trusted")
    folder.mkdir()
    shutil.copy(certificate[0], folder / name)
    access = {
        "file": quick(ca_file=folder / name),
        "certs.d": quick(host_certificates=(tmp_path / "none", tmp_path)),
    }.get(way, quick(ca_paths=(folder,)))
    oci.check_push(fresh(secure.host, "x"), access=access)


def hash_name(certificate: Path) -> str:
    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(certificate)]
    return subprocess.check_output(command, text=True).strip() + ".0"


@pytest.mark.parametrize(
    "variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"]
)
def test_environment_names_certificates(
    secure: QuirkyRegistry, certificate: Certificate, tmp_path: Path, variable: str
) -> None:
    shutil.copy(certificate[0], tmp_path / "ca.crt")
    path = f"/nonexistent:{tmp_path}" if variable == "SSL_CERT_DIR" else tmp_path / "ca.crt"
    oci.check_push(fresh(secure.host, "x"), access=from_environment({variable: str(path)}))


def test_certificates_on_the_command_line_replace_those_of_the_environment(tmp_path: Path) -> None:
    assert not from_environment({"SSL_CERT_FILE": "/x"}, ca_file=tmp_path / "ca.crt").ca_paths


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_certificate_that_cannot_be_used_is_a_mistake_in_the_configuration(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        oci.check_push(oci.parse("registry.invalid/x"), access=quick(ca_file=path))
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        access = from_environment({"SSL_CERT_FILE": str(path)})
        oci.check_push(oci.parse("registry.invalid/x"), access=access)


def test_client_certificate_of_a_host_needs_its_key(certificate: Certificate, tmp_path: Path) -> None:
    folder = tmp_path / "registry.invalid:5000"
    folder.mkdir()
    shutil.copy(certificate[0], folder / "client.cert")
    with pytest.raises(ConfigError, match=r"client\.cert.*client\.key"):
        oci.check_push(oci.parse("registry.invalid:5000/x"), access=quick(host_certificates=(tmp_path,)))


def test_certificates_are_read_again_only_where_they_have_changed(
    certificate: Certificate, tmp_path: Path
) -> None:
    ca_file = tmp_path / "ca.crt"
    shutil.copy(certificate[0], ca_file)
    access = oci.Access(ca_file=ca_file)
    first = tls.context(access, "r.example")
    assert tls.context(access, "r.example") is first
    assert tls.context(access, "other.example") is not first
    os.utime(ca_file, ns=(1, 1))
    assert tls.context(access, "r.example") is not first
    ca_file.write_text("none")
    with pytest.raises(ConfigError, match="no certificate in PEM form"):
        tls.context(access, "r.example")
