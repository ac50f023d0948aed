"""What of a Workspace Kubernetes would refuse."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from tests.workspace.kubernetes.test_objects import made
from tests.workspace.manifests import SERVING, TUNING, serving, tuning

LONG = "workspace-tuning-phi-3-mini-128k-instruct-customer-support-dataset-2026-11-29-run-7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tuning("{name: w}", f"{{name: {LONG}}}"), "metadata.name .* is 'workspace-tuning.*at most 63"),
        (serving("{name: w}", "{name: workspace-phi-3.5-mini}"), "metadata.name .*lower-case"),
        (serving("{name: w}", "{name: w, namespace: My_Space}"), "metadata.namespace is 'My_Space'"),
        (serving("{name: w}", "{name: w, labels: {team: two words}}"), "metadata.labels team is 'two words'"),
        (serving("{name: w}", "{name: w, labels: {a/b/c: d}}"), "metadata.labels is 'a/b/c'"),
        (serving("{apps: x}", "{apps: a b}"), "resource.labelSelector.matchLabels apps is 'a b'"),
        (
            serving(
                "{matchLabels: {apps: x}}", "{matchExpressions: [{key: a, operator: In, values: [b c]}]}"
            ),
            "resource.labelSelector.matchExpressions a is 'b c'",
        ),
        (
            serving("resource: {", "resource: {preferredNodes: [Node_1], "),
            "resource.preferredNodes is 'Node_1'",
        ),
        (serving(": Standard_NC24ads_A100_v4", ": two words"), "resource.instanceType is 'two words'"),
        (
            tuning("imagePushSecret: s", "imagePushSecret: My_Secret"),
            "tuning.output.imagePushSecret is 'My_Secret'",
        ),
        (
            serving("{name: phi-4}", "{name: phi-4, presetOptions: {modelAccessSecret: HF_TOKEN}}"),
            "inference.preset.presetOptions.modelAccessSecret is 'HF_TOKEN'",
        ),
        (
            serving("{name: phi-4}", "{name: phi-4, presetOptions: {modelWeightsPVC: A}}"),
            "presetOptions.modelWeightsPVC is 'A'",
        ),
        (
            serving(
                "{name: phi-4}",
                "{name: phi-4, presetOptions: {modelWeightsPVC: a, modelWeightsSubPath: ../b}}",
            ),
            r"presetOptions.modelWeightsSubPath is '\.\./b'",
        ),
        (
            tuning('urls: ["https://example.org/a.parquet"]', "volumeSource: {persistentVolumeClaim: {}}"),
            "tuning.input.volumeSource.persistentVolumeClaim.claimName is ''",
        ),
        (
            serving("{name: phi-4}", "{name: phi-4, presetOptions: {image: 'https://r.io/x'}}"),
            "inference.preset.presetOptions.image: image 'https://r.io/x': write it without the scheme",
        ),
        (
            tuning(
                'image: "myacr.azurecr.io/a:1", imagePushSecret: s', "volumeSource: {configMap: {name: x}}"
            ),
            "tuning.output.volumeSource.configMap cannot be written to",
        ),
        (
            tuning(
                'image: "myacr.azurecr.io/a:1", imagePushSecret: s',
                "volumeSource: {persistentVolumeClaim: {claimName: x, readOnly: true}}",
            ),
            "tuning.output.volumeSource.persistentVolumeClaim cannot be written to",
        ),
        (SERVING + "---\nkind: Secret\nmetadata: [a]\n", "Secret has no 'metadata.name', which Kubernetes"),
        (
            tuning(
                'image: "myacr.azurecr.io/a:1", imagePushSecret: s',
                "volumeSource: {emptyDir: {sizeLimit: 1GB}}",
            ),
            "tuning.output.volumeSource.emptyDir.sizeLimit is '1GB'",
        ),
        (
            SERVING + "  adapters: [{source: {name: a, volumeSource: {pvc: {}}}}]\n",
            "inference.adapters a.volumeSource: no volumes of kind 'pvc'",
        ),
        (tuning("myacr.azurecr.io/a:1", "oci:/mnt/adapter"), "a layout on a disk that pods do not have"),
    ],
)
def test_names_that_a_cluster_would_refuse_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(text, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "Registry.io/Image:1"}, "lower-case"),
        ({"memory": "16GB"}, "--memory is '16GB', expected a quantity"),
        ({"cpu": "two"}, "--cpu is 'two'"),
        ({"cache_claim": "My_Claim"}, "--cache-claim is 'My_Claim'"),
        ({"api_key": ("a b", "key")}, "--api-key-secret is 'a b'"),
        ({"api_key": ("a", "k k")}, "--api-key-secret is 'k k'"),
    ],
)
def test_flags_are_checked_too(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        made(SERVING, tmp_path, **options)


def test_name_with_dots_is_fine_for_one_job_and_not_for_several_nodes(tmp_path: Path) -> None:
    made(tuning("{name: w}", "{name: phi-3.5}"), tmp_path)
    with pytest.raises(ConfigError, match="that of the Service too"):
        made(
            TUNING.replace("{name: w}", "{name: phi-3.5}").replace("resource: {", "resource: {count: 2, "),
            tmp_path,
        )
