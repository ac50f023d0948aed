"""A small kubelet over podman: runs one pod as a node would, for the parts of a pod that our contract uses.

Init containers in order, containers that share network and memory, emptyDir, ConfigMap, Secret (items,
subPath, projected), hostPath and image volumes, environment from secrets, HTTP and exec probes, SIGTERM and
the grace period, the termination message. Refuses what it does not know. Start at `Pod`.
"""

import base64
import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import kubernetes_validate
import yaml

KUBERNETES = "1.35"
Document = dict[str, Any]


def documents(text: str) -> list[Document]:
    """Return the objects of a YAML text, each checked against Kubernetes' own schema."""
    found: list[Document] = [document for document in yaml.safe_load_all(text) if document]
    for document in found:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    return found


def pod_spec(document: Document) -> Document:
    """Return the pod of a Pod, Job, Deployment or StatefulSet."""
    spec: Document = document["spec"]
    return spec if document["kind"] == "Pod" else spec["template"]["spec"]


@dataclass
class Node:
    """podman, and where volumes lie."""

    folder: Path
    environ: Mapping[str, str]
    images: dict[str, str] = field(default_factory=dict)
    """What stands in for images that cannot be pulled here."""
    claims: dict[str, Path] = field(default_factory=dict)
    """Directories behind persistent volume claims."""

    def podman(
        self, *words: str, check: bool = True, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["podman", *words],
            capture_output=True, text=True, check=False, env=dict(self.environ), timeout=timeout_s,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"podman {' '.join(words)}: {done.stderr}{done.stdout}"
        return done

    def image(self, name: str) -> str:
        return self.images.get(name, name)


class Pod:
    """One pod. `objects` are the ConfigMaps and Secrets of its namespace, `hosts` the names it knows."""

    def __init__(
        self,
        node: Node,
        document: Document,
        objects: Sequence[Document] = (),
        *,
        hosts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.node, self.spec = node, pod_spec(document)
        self.name = f"{document['metadata']['name']}-{secrets.token_hex(3)}"
        self.folder = node.folder / self.name
        self.objects = {(o["kind"], o["metadata"]["name"]): o for o in objects}
        self.grace_s = self.spec.get("terminationGracePeriodSeconds", 30)
        share = "net,ipc,uts" + (",pid" if self.spec.get("shareProcessNamespace") else "")
        node.podman("pod", "create", "--name", self.name, "--share", share, "--hostname", self.name,
                    *(f"--add-host={host}:{address}" for host, address in hosts.items()))  # fmt: skip
        self.volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        self.node.podman("pod", "rm", "-f", "-t", "0", self.name, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> "Pod":
        """Run the init containers to their ends, then start the others."""
        for container in self.spec.get("initContainers", []):
            done = self.node.podman("run", *self._options(container), check=False)
            assert done.returncode == 0, f"init container {container['name']}: {done.stdout}{done.stderr}"
        for container in self.spec["containers"]:
            self.node.podman("run", "-d", *self._options(container))
        return self

    @property
    def ip(self) -> str:
        infra = self.node.podman(
            "pod", "inspect", self.name, "--format", "{{.InfraContainerID}}"
        ).stdout.strip()
        networks = json.loads(self.node.podman("inspect", infra).stdout)[0]["NetworkSettings"]["Networks"]
        address: str = next(iter(networks.values()))["IPAddress"]
        return address

    def container(self, name: str) -> str:
        return f"{self.name}-{name}"

    def logs(self, name: str) -> str:
        done = self.node.podman("logs", self.container(name), check=False)
        return done.stdout + done.stderr

    def message(self, name: str) -> str:
        """Return the termination message."""
        return (self.folder / f"{name}.termination").read_text(encoding="utf-8")

    def volume(self, name: str) -> Path:
        """Return the directory of an emptyDir volume."""
        return self.folder / "volumes" / name

    def state(self, name: str) -> tuple[str, int]:
        """Return status and exit code."""
        text = self.node.podman(
            "inspect", self.container(name), "--format", "{{.State.Status}} {{.State.ExitCode}}"
        ).stdout
        status, code = text.split()
        return status, int(code)

    def wait(self, name: str, timeout_s: float = 180) -> int:
        """Return the exit code once the container has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status, code = self.state(name)
            if status == "exited":
                return code
            time.sleep(0.2)
        raise AssertionError(f"{name} still runs after {timeout_s} s: {self.logs(name)}")

    def ready(self, name: str, timeout_s: float = 120) -> None:
        """Return once startup and readiness probe have passed; liveness counts as soon as startup has."""
        spec = next(c for c in self.spec["containers"] if c["name"] == name)
        needed = [spec[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in spec]
        deadline = time.monotonic() + timeout_s
        for probe in needed:
            while not self.probe(name, probe):
                status, _ = self.state(name)
                assert status == "running", f"{name}: {self.logs(name)}"
                assert time.monotonic() < deadline, f"{name} is not ready: {self.logs(name)}"
                time.sleep(0.25)  # quicker than periodSeconds, so that tests are

    def probe(self, name: str, probe: Document) -> bool:
        """Return whether one probe passes now."""
        if "exec" in probe:
            command = ("exec", self.container(name), *probe["exec"]["command"])
            return self.node.podman(*command, check=False).returncode == 0
        get = probe["httpGet"]
        url = f"http://{self.ip}:{self._port(name, get['port'])}{get.get('path', '/')}"
        try:
            return 200 <= httpx.get(url, timeout=probe.get("timeoutSeconds", 1)).status_code < 400
        except httpx.TransportError:
            return False

    def stop(self, *only: str) -> dict[str, int]:
        """Ask containers to end, as deleting the pod asks all; return the exit codes (137: killed)."""
        stopping = [c for c in self.spec["containers"] if not only or c["name"] in only]
        for container in stopping:
            before = container.get("lifecycle", {}).get("preStop")
            if before:
                self.node.podman("exec", self.container(container["name"]), *before["exec"]["command"])
        for container in stopping:
            name = self.container(container["name"])
            self.node.podman("stop", "-t", str(self.grace_s), name, timeout_s=self.grace_s + 60)
        return {container["name"]: self.state(container["name"])[1] for container in stopping}

    def _port(self, name: str, port: int | str) -> int:
        spec = next(c for c in self.spec["containers"] if c["name"] == name)
        named = {entry.get("name"): entry["containerPort"] for entry in spec.get("ports", [])}
        return named[port] if isinstance(port, str) else port

    def _options(self, container: Document) -> list[str]:
        known = {
            "name", "image", "command", "args", "env", "ports", "resources", "volumeMounts", "workingDir",
            "securityContext", "imagePullPolicy", "startupProbe", "livenessProbe", "readinessProbe",
            "lifecycle", "terminationMessagePolicy",
        }  # fmt: skip
        assert container.keys() <= known, f"this kubelet does not know {container.keys() - known}"
        termination_log = self.folder / f"{container['name']}.termination"
        termination_log.parent.mkdir(parents=True, exist_ok=True)
        termination_log.touch()
        termination_log.chmod(0o666)
        words = ["--pod", self.name, "--name", self.container(container["name"]), "--pull", "never",
                 "-v", f"{termination_log}:/dev/termination-log"]  # fmt: skip
        words += ["-e", "KUBERNETES_SERVICE_HOST=10.96.0.1", "-e", "KUBERNETES_SERVICE_PORT=443"]
        environ = self._environ(container)
        words += [word for name, value in environ.items() for word in ("-e", f"{name}={value}")]
        words += [word for mount in container.get("volumeMounts", []) for word in self._mount(mount)]
        words += _security({**self.spec.get("securityContext", {}), **container.get("securityContext", {})})
        if "workingDir" in container:
            words += ["-w", container["workingDir"]]
        entry, *command = container.get("command", [""])
        if entry:
            words += ["--entrypoint", json.dumps([entry, *command])]
        given = [_expand(word, environ) for word in container.get("args", [])]
        return [*words, self.node.image(container["image"]), *given]

    def _environ(self, container: Document) -> dict[str, str]:
        values = {variable["name"]: self._value(variable) for variable in container.get("env", [])}
        return {name: _expand(value, values) for name, value in values.items() if value is not None}

    def _value(self, variable: Document) -> str | None:
        """Return a variable's value, None where an optional secret is not there."""
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            index = "metadata.labels['apps.kubernetes.io/pod-index']"
            return {"metadata.name": self.name, index: "0"}[source["fieldRef"]["fieldPath"]]
        reference = source["secretKeyRef"]
        found = self.objects.get(("Secret", reference["name"]))
        if found is None and reference.get("optional"):
            return None
        assert found is not None, f"no Secret {reference['name']}"
        return _contents(found)[reference["key"]].decode()

    def _mount(self, mount: Document) -> Iterator[str]:
        volume, target = self.volumes[mount["name"]], mount["mountPath"]
        if "image" in volume:
            source = self.node.image(volume["image"]["reference"])
            if "subPath" in mount:
                inside = Path(self.node.podman("image", "mount", source).stdout.strip()) / mount["subPath"]
                yield from ("-v", f"{inside}:{target}:ro")
                return
            yield from ("--mount", f"type=image,source={source},destination={target}")
            return
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            yield from ("--mount", f"type=tmpfs,destination={target},tmpfs-mode=1777")
            return
        folder = self._folder(volume)
        if "subPath" in mount:
            folder /= mount["subPath"]
        readonly = mount.get("readOnly") or volume.keys() & {"configMap", "secret", "projected"}
        yield from ("-v", f"{folder}:{target}{':ro' if readonly else ''}")

    def _folder(self, volume: Document) -> Path:
        """Return the directory behind a volume, made and filled when it is first needed."""
        if "persistentVolumeClaim" in volume:
            return self.node.claims[volume["persistentVolumeClaim"]["claimName"]]
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        folder = self.volume(volume["name"])
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # as the kubelet makes an emptyDir
        sources = volume.get("projected", {}).get("sources", [volume])
        for source in sources:
            for kind, key, named in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
                if key in source:
                    reference = source[key].get(named) or source[key]["name"]
                    found = _contents(self.objects[(kind, reference)])
                    paths = {item["key"]: item["path"] for item in source[key].get("items", [])}
                    for name, content in found.items():
                        if not paths or name in paths:
                            (folder / paths.get(name, name)).write_bytes(content)
        return folder


def _contents(found: Document) -> dict[str, bytes]:
    plain = {name: text.encode() for name, text in found.get("stringData", {}).items()}
    if found["kind"] == "ConfigMap":
        return {name: text.encode() for name, text in found.get("data", {}).items()}
    return plain | {name: base64.b64decode(text) for name, text in found.get("data", {}).items()}


def _security(context: Document) -> Iterator[str]:
    if "runAsUser" in context:
        yield from ("--user", f"{context['runAsUser']}:{context.get('runAsGroup', 0)}")
    if context.get("readOnlyRootFilesystem"):
        yield "--read-only"
        yield "--read-only-tmpfs=false"  # Kubernetes gives no writable /tmp of its own
    capabilities = context.get("capabilities", {})
    yield from (f"--cap-drop={name}" for name in capabilities.get("drop", []))
    yield from (f"--cap-add={name}" for name in capabilities.get("add", []))
    if context.get("allowPrivilegeEscalation") is False:
        yield from ("--security-opt", "no-new-privileges")


def _expand(word: str, environ: Mapping[str, str]) -> str:
    return re.sub(r"\$\(([\w.-]+)\)", lambda found: environ.get(found[1], found[0]), word)
