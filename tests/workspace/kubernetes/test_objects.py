"""Kubernetes objects of Workspaces, held against Kubernetes' own schemas, and the examples that hold them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EXIT_CODES, RETRIABLE, ConfigError, Failure
from runtime.workspace import kubernetes, load_job, load_server
from runtime.workspace.kubernetes import PodOptions
from runtime.workspace.kubernetes import text as kubernetes_text
from runtime.workspace.manifest import read_file
from tests.workspace.manifests import DOCUMENTS, SERVING, TUNING, Written

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples/kubernetes"
KUBERNETES = "1.35"
Object = dict[str, Any]

INFERENCE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: served}
inference:
  preset: {name: phi-3-mini-128k-instruct, presetOptions: {modelAccessSecret: hub, modelWeightsPVC: weights}}
  adapters:
    - {source: {name: support, image: "registry.example/support:1", imagePullSecrets: [pull, pull]}}
    - {source: {name: local, volumeSource: {hostPath: {path: /srv/adapter}}}, strength: "0.5"}
"""

SECRET = """---
apiVersion: v1
kind: Secret
metadata: {name: hub}
stringData: {HF_TOKEN: hf_private}
"""


def made(text: str, folder: Path, **options: Any) -> tuple[list[Object], tuple[str, ...]]:
    """Return the objects and warnings of the file `text`, the objects checked against the schemas."""
    file = folder / "workspace.yaml"
    file.write_bytes(text.encode())
    objects, warnings = kubernetes.objects(file, PodOptions(**{"image": "image:1", **options}))
    for document in objects:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    return objects, warnings


WHOLE = """
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w, namespace: n, labels: {a: b}, annotations: {kaito.sh/enablelb: "True", x: y}}
resource:
  count: 1
  instanceType: Standard_NC24ads_A100_v4
  preferredNodes: [a]
  labelSelector: {matchLabels: {apps: x}, matchExpressions: [{key: k, operator: In, values: [v]}]}
WORK:
  preset:
    name: phi-3-mini-128k-instruct
    accessMode: public
    presetOptions:
      {image: i, imagePullSecrets: [s], modelAccessSecret: h, modelWeightsPVC: p, modelWeightsSubPath: q}
"""
WHOLE_TUNING = (
    WHOLE.replace("WORK", "tuning")
    + """
  method: qlora
  config: qlora-params-template
  input: {name: d, image: r.io/a:1, imagePullSecrets: [p]}
  output: {image: "myacr.azurecr.io/a:1", imagePushSecret: s}
"""
)
WHOLE_SERVING = (
    WHOLE.replace("WORK", "inference")
    + """
  config: inference-params-template
  adapters:
  - {source: {name: d, image: r.io/a:1, imagePullSecrets: [p]}, strength: "0.5"}
  - {source: {name: e, volumeSource: {emptyDir: {sizeLimit: 1Gi}}}}
"""
)
ODD: tuple[Any, ...] = (
    None, "", [], {}, 0, -1, True, 1.5, "x" * 300, "ä", "a b", "../x", [None], [[]], {"a": {"b": 1}},
    ["a", "a"], "$(X)", "\n", 10**30, "1e5", {1: 2},
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield (*here, key)
        yield from places(each, (*here, key))


@given(st.sampled_from([WHOLE_TUNING, WHOLE_SERVING]), st.data(), st.sampled_from(ODD))
@settings(max_examples=150)
def test_any_field_with_an_odd_value_is_refused_in_one_line_or_fits_the_schemas(
    tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject, odd: Any
) -> None:
    document = yaml.safe_load(text)
    *parents, last = data.draw(st.sampled_from(list(places(document))))
    place = document
    for key in parents:
        place = place[key]
    place[last] = odd
    folder = tmp_path_factory.mktemp("odd")
    try:
        objects, _ = made(yaml.safe_dump(document, allow_unicode=True), folder)
    except Failure as failure:
        assert "\n" not in str(failure)
    else:
        assert list(yaml.safe_load_all(kubernetes_text.dump(objects))) == objects


def of_kind(kind: str, objects: list[Object]) -> Object:
    (found,) = [document for document in objects if document["kind"] == kind]
    return found


def pod_of(objects: list[Object]) -> Object:
    """Return the pod of the one Job or Deployment."""
    (owner,) = [document for document in objects if document["kind"] in ("Job", "Deployment")]
    spec: Object = owner["spec"]["template"]["spec"]
    return spec


def container_of(objects: list[Object]) -> Object:
    (container,) = pod_of(objects)["containers"]
    return dict(container)


@pytest.mark.parametrize("written", [it for it in DOCUMENTS if not it.refused], ids=lambda it: it.name)
def test_documents_become_objects_that_a_cluster_takes(written: Written, tmp_path: Path) -> None:
    objects, _ = made(written.text, tmp_path)
    kinds = [document["kind"] for document in objects]
    works = [each.work for each in read_file(tmp_path / "workspace.yaml").workspaces]
    assert (kinds.count("Job"), kinds.count("Deployment")) == (
        works.count("tuning"),
        works.count("inference"),
    )


def test_examples_fit_the_schemas() -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] != "Workspace":
                kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_example_question_goes_to_the_service_of_the_workspace() -> None:
    service = next(
        d for d in yaml.safe_load_all((EXAMPLES / "serving.yaml").read_text()) if d["kind"] == "Service"
    )
    assert f"http://{service['metadata']['name']}/chat" in (EXAMPLES / "curl.yaml").read_text()
    assert service["spec"]["ports"][0]["port"] == 80


def test_job_fails_for_good_where_another_try_would_end_alike() -> None:
    job = next(d for d in yaml.safe_load_all((EXAMPLES / "tuning.yaml").read_text()) if d["kind"] == "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    final = {EXIT_CODES[kind] for kind in EXIT_CODES if kind not in RETRIABLE and kind is not Failure}
    by_action = {(r["action"], *r.get("onExitCodes", {}).get("values", ())) for r in rules}
    assert by_action == {("Ignore",), ("Ignore", 143), ("FailJob", *sorted(final))}
    pod = job["spec"]["template"]["spec"]
    assert all(
        r["onExitCodes"]["containerName"] == pod["containers"][0]["name"] for r in rules if "onExitCodes" in r
    )
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it


def test_pod_reads_the_same_server_and_the_same_job(tmp_path: Path) -> None:
    """What the pod makes of the ConfigMap is what this machine makes of the file."""
    config = (
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: mine}\ndata:\n"
        "  training_config.yaml: |\n"
        "    training_config: {QuantizationConfig: {load_in_4bit: true}, LoraConfig: {r: 4}}\n"
        "  inference_config.yaml: |\n    vllm: {max-model-len: 4096}\n"
    )
    environ, pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path / "pod.yaml"
    for text, load in ((TUNING, load_job), (SERVING, load_server)):
        objects, _ = made(text + "  config: mine\n" + config, tmp_path)
        (map_,) = [d for d in objects if d["kind"] == "ConfigMap"]
        pod.write_text(map_["data"]["workspace.yaml"])
        here = load(tmp_path / "workspace.yaml", environ=environ).config
        there = load(pod, environ=environ).config
        assert here.model_dump(exclude={"sources"}) == there.model_dump(exclude={"sources"})
    assert of_kind("Deployment", objects)["metadata"]["name"] == "w"


def test_configuration_of_a_flag_replaces_the_named_one(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("vllm: {max-model-len: 4096}\n")
    objects, _ = made(SERVING + "  config: elsewhere\n", tmp_path, config=config)
    map_, container = of_kind("ConfigMap", objects), container_of(objects)
    mount = next(m for m in container["volumeMounts"] if m["name"] == "workspace")
    read = [word.removeprefix(f"{mount['mountPath']}/") for word in container["args"]]
    assert {"workspace.yaml", "config.yaml"} == map_["data"].keys() & set(read)
    assert read[read.index("config.yaml") - 1] == "--config"
    assert yaml.safe_load(map_["data"]["config.yaml"]) == {"vllm": {"max-model-len": 4096}}


def test_secret_is_passed_on_and_in_no_config_map(tmp_path: Path) -> None:
    text = INFERENCE.replace("{name: served}", "{name: served, namespace: llm}") + "# hf_comment\n" + SECRET
    objects, _ = made(text, tmp_path)
    assert of_kind("Secret", objects)["metadata"]["namespace"] == "llm"
    assert of_kind("Secret", objects)["stringData"] == {"HF_TOKEN": "hf_private"}
    assert "hf_" not in str(of_kind("ConfigMap", objects))


def test_secret_without_the_key_that_the_pod_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Secret hub has no key 'HF_TOKEN'.* it has 'token'") as caught:
        made(INFERENCE + SECRET.replace("HF_TOKEN", "token"), tmp_path)
    assert "hf_private" not in str(caught.value)
    with pytest.raises(ConfigError, match="Secret hub is in namespace 'other'"):
        made(
            INFERENCE.replace("name: served", "name: served, namespace: llm")
            + SECRET.replace("name: hub", "name: hub, namespace: other"),
            tmp_path,
        )


def test_secret_with_words_in_place_of_base64_is_named(tmp_path: Path) -> None:
    text = INFERENCE + SECRET.replace("stringData: {HF_TOKEN: hf_private}", "data: {HF_TOKEN: <your token>}")
    assert (
        "Secret hub: data.HF_TOKEN is no base64; write the value itself into stringData"
        in made(text, tmp_path)[1]
    )


def test_namespace_labels_and_annotations_are_on_every_object(tmp_path: Path) -> None:
    metadata = (
        "{name: w, namespace: llm, labels: {team: a, commit: '12e4567'}, "
        "annotations: "
        "{service.beta.kubernetes.io/internal: 'true', kubectl.kubernetes.io/x: y, kaito.sh/a: b}}"
    )
    objects, warnings = made(SERVING.replace("{name: w}", metadata), tmp_path)
    for document in objects:
        assert document["metadata"]["namespace"] == "llm"
        assert document["metadata"]["labels"].items() >= {"team": "a", "commit": "12e4567"}.items()
        assert document["metadata"]["annotations"] == {"service.beta.kubernetes.io/internal": "true"}
    template = of_kind("Deployment", objects)["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "a"
    assert "team" not in of_kind("Service", objects)["spec"]["selector"]
    assert any("metadata.annotations kaito.sh/a has no effect" in warning for warning in warnings)


@pytest.mark.parametrize(("written", "kind"), [('"True"', "LoadBalancer"), ('"false"', None)])
def test_load_balancer_is_asked_for_by_annotation(written: str, kind: str | None, tmp_path: Path) -> None:
    text = SERVING.replace("{name: w}", f"{{name: w, annotations: {{kaito.sh/enablelb: {written}}}}}")
    objects, warnings = made(text, tmp_path)
    assert of_kind("Service", objects)["spec"].get("type") == kind
    assert any("give --api-key-secret" in warning for warning in warnings) == (kind is not None)
    assert not any("api-key" in warning for warning in made(text, tmp_path, api_key=("k", "v"))[1])


def test_load_balancer_of_a_tuning_workspace_is_said_to_have_no_effect(tmp_path: Path) -> None:
    text = TUNING.replace("{name: w}", "{name: w, annotations: {kaito.sh/enablelb: 'true'}}")
    assert any("kaito.sh/enablelb has no effect on tuning" in warning for warning in made(text, tmp_path)[1])


def test_load_balancer_before_a_key_of_the_configuration_needs_no_other(tmp_path: Path) -> None:
    text = SERVING.replace("{name: w}", "{name: w, annotations: {kaito.sh/enablelb: 'true'}}")
    keyed = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  inference_config.yaml: |\n"
    warnings = made(f"{text}  config: c\n{keyed}    vllm: {{api-key: abc}}\n", tmp_path)[1]
    assert not any("anybody who reaches" in warning for warning in warnings)


def test_pod_is_given_no_annotation_but_the_runtime(tmp_path: Path) -> None:
    written = "{kaito.sh/runtime: vllm, kaito.sh/x: y, kaito.sh/enablelb: 'true', a/b: c}"
    objects, _ = made(SERVING.replace("{name: w}", f"{{name: w, annotations: {written}}}"), tmp_path)
    read = yaml.safe_load(of_kind("ConfigMap", objects)["data"]["workspace.yaml"])
    assert read["metadata"]["annotations"] == {"kaito.sh/runtime": "vllm"}


def test_api_key_and_token_come_from_secrets(tmp_path: Path) -> None:
    objects, _ = made(INFERENCE, tmp_path, api_key=("keys", "api-key"))
    values = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in container_of(objects)["env"]}
    assert values == {
        "HF_TOKEN": {"name": "hub", "key": "HF_TOKEN"},
        "RUNTIME_API_KEY": {"name": "keys", "key": "api-key"},
    }
    assert pod_of(objects)["automountServiceAccountToken"] is False


def test_a_file_of_api_keys_is_mounted_from_a_secret_and_read(tmp_path: Path) -> None:
    objects, _ = made(INFERENCE, tmp_path, api_key_file=("keys", "team.yaml"))
    serve = container_of(objects)
    assert serve["args"][-2:] == ["--api-key-file", "/etc/workspace-runtime/api-keys"]
    assert {"name": "api-keys", "mountPath": "/etc/workspace-runtime"} in serve["volumeMounts"]
    volume = next(v for v in pod_of(objects)["volumes"] if v["name"] == "api-keys")
    items = [{"key": "team.yaml", "path": "api-keys"}]
    assert volume["secret"] == {"secretName": "keys", "items": items, "defaultMode": 0o440}


def test_gated_model_is_warned_of_only_without_its_secret(tmp_path: Path) -> None:
    gated = SERVING.replace("{name: phi-4}", "{name: llama-3.1-8b-instruct}")
    assert any("is gated" in warning for warning in made(gated, tmp_path)[1])
    with_secret = gated.replace("instruct}", "instruct, presetOptions: {modelAccessSecret: hub}}")
    assert not any("is gated" in warning for warning in made(with_secret, tmp_path)[1])


def test_adapters_are_pulled_by_the_server_or_mounted_by_the_node(tmp_path: Path) -> None:
    pod = pod_of(made(INFERENCE, tmp_path)[0])
    (registries,) = [v for v in pod["volumes"] if v["name"] == "registries"]
    assert [s["secret"]["name"] for s in registries["projected"]["sources"]] == ["pull"]
    pod = pod_of(made(INFERENCE, tmp_path, image_volumes=True)[0])
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
    image = volumes[mounts["/mnt/adapter/support"]["name"]]["image"]
    assert image["reference"] == "registry.example/support:1"
    assert mounts["/mnt/adapter/support"]["subPath"] == "data"
    assert "hostPath" in volumes[mounts["/mnt/adapter/local"]["name"]]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]


def test_weights_and_pull_secrets_of_the_preset_options_are_carried_out(tmp_path: Path) -> None:
    options = "modelWeightsPVC: weights, modelWeightsSubPath: phi, imagePullSecrets: [acr, acr]"
    text = SERVING.replace("{name: phi-4}", f"{{name: phi-4, presetOptions: {{{options}}}}}")
    objects, _ = made(text, tmp_path)
    mounts = {mount["mountPath"]: mount for mount in container_of(objects)["volumeMounts"]}
    assert mounts["/workspace/weights"]["subPath"] == "phi"
    assert pod_of(objects)["imagePullSecrets"] == [{"name": "acr"}]


def test_image_of_the_preset_is_said_not_to_run(tmp_path: Path) -> None:
    text = SERVING.replace("{name: phi-4}", "{name: phi-4, presetOptions: {image: r.io/x:1}}")
    assert any("r.io/x:1', which is not used: image:1 runs" in warning for warning in made(text, tmp_path)[1])
    ours = text.replace("r.io/x:1", "image:1")
    assert not any("is not used" in warning for warning in made(ours, tmp_path)[1])


def test_processors_memory_and_disk_are_requested(tmp_path: Path) -> None:
    resources = container_of(made(SERVING, tmp_path)[0])["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": 1}
    assert resources["requests"].keys() == {"cpu", "memory", "ephemeral-storage"}
    assert int(resources["requests"]["ephemeral-storage"].removesuffix("Gi")) > 27  # the weights' files
    kept = container_of(made(SERVING, tmp_path, cpu="8", memory="20Gi", cache_claim="cache")[0])["resources"]
    assert kept["requests"] == {"cpu": "8", "memory": "20Gi"}
    claim = SERVING.replace("{name: phi-4}", "{name: phi-4, presetOptions: {modelWeightsPVC: weights}}")
    mounted = container_of(made(claim, tmp_path, gpus=0)[0])["resources"]["requests"]
    assert mounted.keys() == {"cpu", "memory"}  # nothing is downloaded
    assert int(mounted["memory"].removesuffix("Gi")) > 2 * 27
    without = container_of(made(SERVING, tmp_path, gpus=0)[0])["resources"]
    assert "limits" not in without
    assert int(without["requests"]["memory"].removesuffix("Gi")) > 2 * 27  # float32


def test_cache_lies_on_the_claim(tmp_path: Path) -> None:
    objects, _ = made(SERVING, tmp_path, cache_claim="cache")
    (cache,) = [volume for volume in pod_of(objects)["volumes"] if volume["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "cache"}


def test_pods_are_replaced_when_what_they_read_changes(tmp_path: Path) -> None:
    def annotations(text: str) -> Object:
        template = of_kind("Deployment", made(text, tmp_path)[0])["spec"]["template"]
        return dict(template["metadata"]["annotations"])

    adapters = '  adapters: [{source: {name: a, image: "r.io/a:1"}, strength: "0.5"}]\n'
    first = annotations(SERVING + adapters)
    assert annotations(SERVING + adapters + "# a comment\n") == first
    assert annotations(SERVING + adapters.replace("0.5", "0.6")) != first


def test_volume_keys_without_a_value_are_left_out(tmp_path: Path) -> None:
    text = TUNING.replace(
        'image: "myacr.azurecr.io/a:1", imagePushSecret: s',
        "volumeSource: {emptyDir: , nfs: {server: s, path: /}}",
    )
    (results,) = [
        volume for volume in pod_of(made(text, tmp_path)[0])["volumes"] if volume["name"] == "results"
    ]
    assert results == {"name": "results", "nfs": {"server": "s", "path": "/"}}


def test_pod_lives_until_its_answers_are_complete(tmp_path: Path) -> None:
    pod = pod_of(made(INFERENCE, tmp_path)[0])
    (sleep,) = re.findall(r"\d+", str(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]))
    assert pod["terminationGracePeriodSeconds"] >= int(sleep) + 25 + 5


def test_several_nodes_meet_at_the_first_pod() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "two_nodes.yaml").read_text()))
    service, job = of_kind("Service", documents), of_kind("Job", documents)
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    environ = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert environ["NNODES"] == "2"
    # A pod of an indexed Job is called JOB-INDEX, below its subdomain, which is the headless Service.
    assert environ["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"]) == ("None", 29500)


def test_two_workspaces_of_one_file_are_both_made(tmp_path: Path) -> None:
    objects, _ = made(TUNING + "---\n" + SERVING.replace("name: w", "name: v"), tmp_path)
    assert [d["metadata"]["name"] for d in objects] == ["w-workspace", "w", "v-workspace", "v", "v"]
    with pytest.raises(ConfigError, match="two Workspaces are named 'w'"):
        made(TUNING + "---\n" + SERVING, tmp_path)


def test_other_documents_are_passed_on_and_controllers_own_left_out(tmp_path: Path) -> None:
    others = (
        "---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: c}\n"
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: llm}\n"
        "---\napiVersion: kaito.sh/v1beta1\nkind: RAGEngine\nmetadata: {name: r}\n"
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: other}\ndata: {a: b}\n"
    )
    objects, warnings = made(SERVING.replace("{name: w}", "{name: w, namespace: llm}") + others, tmp_path)
    found = [(d["kind"], d["metadata"].get("namespace")) for d in objects[:3]]
    assert found == [("PersistentVolumeClaim", "llm"), ("Namespace", None), ("ConfigMap", "llm")]
    assert "workspace.yaml: RAGEngine is left out: it needs the controller" in warnings


def test_input_and_output_in_one_place_are_refused(tmp_path: Path) -> None:
    text = TUNING + "  config: c\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n"
    text += (
        "  training_config.yaml: |\n    training_config: {QuantizationConfig: {load_in_4bit: true}, "
        "TrainingArguments: {output_dir: /mnt/data}}\n"
    )
    with pytest.raises(ConfigError, match="two volumes at /mnt/data"):
        made(text, tmp_path)


def test_config_map_larger_than_a_cluster_takes_is_refused(tmp_path: Path) -> None:
    text = SERVING + "  config: c\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n"
    text += f"  inference_config.yaml: 'chat-template: \"{{{{ {'x' * (1 << 20)} }}}}\"'\n"
    with pytest.raises(ConfigError, match="expected at most 1048576 of a ConfigMap"):
        made(text, tmp_path)
