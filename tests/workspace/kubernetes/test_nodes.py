"""On which nodes a pod may run."""

from typing import Any

from runtime.workspace.kubernetes import nodes
from runtime.workspace.schema import Resource


def resource(**fields: Any) -> Resource:
    return Resource.model_validate(fields)


def required(selected: dict[str, Any]) -> Any:
    return selected["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]


def test_labels_are_required_where_no_instance_type_is_named() -> None:
    selected = nodes.selection(resource(labelSelector={"matchLabels": {"apps": "x"}}), gpus=True)
    assert selected["nodeSelector"] == {"apps": "x"}
    assert "affinity" not in selected


def test_labels_beside_an_instance_type_are_preferred_and_said() -> None:
    described = resource(instanceType="Standard_X", labelSelector={"matchLabels": {"apps": "x"}})
    selected = nodes.selection(described, gpus=True)
    assert selected["nodeSelector"] == {"node.kubernetes.io/instance-type": "Standard_X"}
    (preferred,) = selected["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"] == {
        "matchExpressions": [{"key": "apps", "operator": "In", "values": ["x"]}]
    }
    (warning,) = list(nodes.warnings(described, "w.yaml", gpus=True))
    assert "(apps=x) is preferred, not required" in warning


def test_expressions_are_required() -> None:
    expressions = [
        {"key": "gpu", "operator": "In", "values": ["a", "b"]},
        {"key": "old", "operator": "DoesNotExist"},
    ]
    selected = nodes.selection(resource(labelSelector={"matchExpressions": expressions}), gpus=False)
    assert required(selected) == {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    assert "tolerations" not in selected


def test_preferred_nodes_are_preferred_by_name() -> None:
    selected = nodes.selection(resource(preferredNodes=["node-a", "node-b"]), gpus=True)
    terms = selected["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    fields = [term["preference"]["matchFields"][0] for term in terms]
    # A field of a node is compared with one value alone.
    assert [(field["key"], field["values"]) for field in fields] == [
        ("metadata.name", ["node-a"]),
        ("metadata.name", ["node-b"]),
    ]


def test_instance_type_is_not_required_without_gpus_and_said() -> None:
    described = resource(instanceType="Standard_X")
    assert nodes.selection(described, gpus=False) == {}
    assert "Standard_X is not required" in next(nodes.warnings(described, "w.yaml", gpus=False))


def test_instance_type_is_written_as_its_nodes_are_labelled_and_said() -> None:
    described = resource(instanceType="standard_nc24ads_a100_V4")
    selected = nodes.selection(described, gpus=True)
    assert selected["nodeSelector"] == {"node.kubernetes.io/instance-type": "Standard_NC24ads_A100_v4"}
    (warning,) = nodes.warnings(described, "w.yaml", gpus=True)
    assert "standard_nc24ads_a100_V4 is written Standard_NC24ads_A100_v4" in warning
    assert list(nodes.warnings(resource(instanceType="g5.xlarge"), "w.yaml", gpus=True)) == []


def test_machine_without_a_gpu_is_required_where_none_is_asked_for() -> None:
    described = resource(instanceType="Standard_D4s_v5")
    assert nodes.selection(described, gpus=False)["nodeSelector"] == {
        "node.kubernetes.io/instance-type": "Standard_D4s_v5"
    }
    assert list(nodes.warnings(described, "w.yaml", gpus=False)) == []
