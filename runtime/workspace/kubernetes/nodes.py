"""Which nodes a pod may run on: by instance type, labels, expressions and preferred names.

Knows a Workspace's `resource`, not how many GPUs a pod has. Start at `selection`.
"""

from collections.abc import Iterator
from typing import Any

from runtime import instance_types
from runtime.workspace.schema import LabelSelector, Resource

Object = dict[str, Any]

INSTANCE_TYPE = "node.kubernetes.io/instance-type"
_MOST_WEIGHT = 100

TOLERATIONS: tuple[Object, ...] = (
    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "sku", "value": "gpu", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"},
)
"""Taints of nodes with GPUs, as clouds and KAITO set them."""


def selection(resource: Resource, *, gpus: bool) -> Object:
    """Return the keys of a pod that choose its node; the tolerations only for nodes with GPUs.

    With an instance type `matchLabels` are preferred, not required: a controller puts them on the nodes that
    it makes, and here nobody does.
    """
    selector = resource.label_selector or LabelSelector()
    required = dict(selector.match_labels)
    preferred: list[Object] = []
    if _requires_type(resource, gpus=gpus):
        if required:
            preferred.append({"matchExpressions": [_equals(*label) for label in required.items()]})
        required = {INSTANCE_TYPE: instance_types.canonical(resource.instance_type)}
    for name in resource.preferred_nodes:
        field = {"key": "metadata.name", "operator": "In", "values": [name]}
        preferred.append({"matchFields": [field]})
    expressions = [
        {"key": it.key, "operator": it.operator} | ({"values": it.values} if it.values else {})
        for it in selector.match_expressions
    ]
    affinity = {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": expressions}] if expressions else []
        },
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": _MOST_WEIGHT, "preference": preference} for preference in preferred
        ],
    }
    chosen = {
        name: rule
        for name, rule in affinity.items()
        if any(rule.values() if isinstance(rule, dict) else rule)
    }
    return {
        **({"nodeSelector": required} if required else {}),
        **({"affinity": {"nodeAffinity": chosen}} if chosen else {}),
        **({"tolerations": [dict(each) for each in TOLERATIONS]} if gpus else {}),
    }


def warnings(resource: Resource, where: str, *, gpus: bool) -> Iterator[str]:
    """Yield what of the selection is other or weaker here than with a controller."""
    labels = resource.label_selector.match_labels if resource.label_selector else {}
    name = resource.instance_type
    spelling = instance_types.canonical(name)
    if name and not _requires_type(resource, gpus=gpus):
        yield f"{where} resource.instanceType {name} is not required: no GPU is requested"
    elif spelling != name:
        yield f"{where} resource.instanceType {name} is written {spelling}, as the label of its nodes is"
    if labels and _requires_type(resource, gpus=gpus):
        written = ", ".join(f"{key}={value}" for key, value in labels.items())
        yield (
            f"{where} resource.labelSelector ({written}) is preferred, not required: without the controller "
            f"nobody labels the nodes, which are chosen by their instance type {spelling}"
        )


def _requires_type(resource: Resource, *, gpus: bool) -> bool:
    """Whether only nodes of the instance type will do: not one that was named for GPUs nobody asks for."""
    name = resource.instance_type
    return bool(name) and (gpus or instance_types.has_no_gpu(name))


def _equals(key: str, value: str) -> Object:
    return {"key": key, "operator": "In", "values": [value]}
