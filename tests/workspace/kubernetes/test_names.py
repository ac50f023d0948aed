"""Kubernetes' rules on names, labels, quantities and volumes, at their edges."""

from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.workspace.kubernetes import names

LONG = "a" * 63


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (names.label, "llm"),
        (names.label, LONG),
        (names.label, "1a"),
        (names.service, "phi-3"),
        (names.service, LONG),
        (names.subdomain, "a.b-c.1"),
        (names.subdomain, f"{LONG}.{LONG}.{LONG}.{'a' * 61}"),
        (names.label_key, "apps"),
        (names.label_key, "node.kubernetes.io/instance-type"),
        (names.label_value, ""),
        (names.label_value, "Standard_NC24ads_A100_v4"),
        (names.label_value, LONG),
        (names.secret_key, ".dockerconfigjson"),
        (names.quantity, 4),
        (names.quantity, "500m"),
        (names.quantity, "1.5Gi"),
        (names.quantity, "16G"),
        (names.quantity, "1e9"),
        (names.sub_path, "models/phi"),
        (names.sub_path, ""),
        (names.volume, {"emptyDir": {"sizeLimit": "1Gi"}}),
        (names.volume, {"emptyDir": {}, "hostPath": None}),
        (names.volume, {"persistentVolumeClaim": {"claimName": "rows"}}),
        (names.volume, {"nfs": {"server": "s", "path": "/"}}),
        (names.subdomain, "ACR_REGISTRY_SECRET_HERE"),  # an example's placeholder
    ],
)
def test_what_a_cluster_takes_passes(rule: Callable[[Any, str], None], value: Any) -> None:
    rule(value, "field")


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (names.label, ""),
        (names.label, LONG + "a"),
        (names.label, "a.b"),
        (names.label, "A"),
        (names.label, "a-"),
        (names.service, "3-phi"),
        (names.service, "phi-3.5"),
        (names.service, "phi_3"),
        (names.subdomain, "a..b"),
        (names.subdomain, ".a"),
        (names.subdomain, "a_b"),
        (names.subdomain, "a" * 254),
        (names.label_key, "a/b/c"),
        (names.label_key, "UPPER.io/a"),
        (names.label_key, "/a"),
        (names.label_key, f"{LONG}a"),
        (names.label_value, "two words"),
        (names.label_value, "-a"),
        (names.label_value, LONG + "a"),
        (names.secret_key, "a b"),
        (names.secret_key, ""),
        (names.quantity, "16GB"),
        (names.quantity, "16 Gi"),
        (names.quantity, "lots"),
        (names.quantity, "-1"),
        (names.quantity, True),
        (names.quantity, ""),
        (names.sub_path, "/abs"),
        (names.sub_path, "a/../b"),
        (names.volume, {}),
        (names.volume, {"emptyDir": {}, "hostPath": {"path": "/x"}}),
        (names.volume, {"emptyDirr": {}}),
        (names.volume, {"emptyDir": {"size": "1Gi"}}),
        (names.volume, {"persistentVolumeClaim": {"claim": "rows"}}),
        (names.volume, {"emptyDir": {"sizeLimit": "1GB"}}),
        (names.volume, {"persistentVolumeClaim": {}}),
        (names.volume, {"persistentVolumeClaim": {"claimName": "A"}}),
        (names.volume, {"hostPath": {"path": "x"}}),
        (names.volume, {"emptyDir": "x"}),
    ],
)
def test_what_it_would_refuse_is_refused_with_the_field(rule: Callable[[Any, str], None], value: Any) -> None:
    with pytest.raises(ConfigError, match="field") as caught:
        rule(value, "field")
    assert "\n" not in str(caught.value)


def test_annotations_have_room_for_256_kib_together() -> None:
    names.annotations({"a": "x" * ((256 << 10) - 1)}, "metadata.annotations")
    with pytest.raises(ConfigError, match="are 262145 bytes, expected at most 262144"):
        names.annotations({"a": "x" * ((256 << 10) - 1), "b": ""}, "metadata.annotations")


def test_name_of_a_service_leaves_room() -> None:
    names.service("a" * 61, "name", room=2)
    with pytest.raises(ConfigError, match="at most 61"):
        names.service("a" * 62, "name", room=2)
