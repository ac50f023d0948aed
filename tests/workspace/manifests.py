"""Workspaces as people write them, each with what `runtime tune` or `serve --dry-run` makes of it."""

from dataclasses import dataclass, field
from typing import Any

TUNING = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
resource: {instanceType: Standard_NC24ads_A100_v4, labelSelector: {matchLabels: {apps: x}}}
tuning:
  preset: {name: phi-3-mini-128k-instruct}
  method: qlora
  input: {urls: ["https://example.org/a.parquet"]}
  output: {image: "myacr.azurecr.io/a:1", imagePushSecret: s}
"""

SERVING = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
resource: {instanceType: Standard_NC24ads_A100_v4, labelSelector: {matchLabels: {apps: x}}}
inference:
  preset: {name: phi-4}
"""


@dataclass(frozen=True)
class Written:
    """One file; `settings` are expected of its dry run, `says` matches one of its warnings."""

    name: str
    text: str
    settings: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    refused: str = ""
    """What the one line says instead; "" where the file is accepted."""
    command: str = ""
    """"tune" or "serve"; "" decides by the text."""

    @property
    def arguments(self) -> list[str]:
        command = self.command or ("tune" if "tuning" in self.text else "serve")
        return [command, "--dry-run", "--json"]


def tuning(old: str, new: str) -> str:
    assert old in TUNING
    return TUNING.replace(old, new)


def serving(old: str, new: str) -> str:
    assert old in SERVING
    return SERVING.replace(old, new)


MAP = """---
apiVersion: v1
kind: ConfigMap
metadata: {{name: {name}}}
data:
  {key}: |
    {text}
"""

VLLM = MAP.format(name="mine", key="inference_config.yaml", text="vllm: {max-model-len: 4096}")
QLORA = MAP.format(
    name="mine",
    key="training_config.yaml",
    text="training_config: {QuantizationConfig: {load_in_4bit: true}, LoraConfig: {r: 4}}",
)

DOCUMENTS = (
    # --- keys without a value
    Written(
        "every optional key left empty",
        """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: workspace-phi-4-mini
  annotations:
  labels:
resource:
  count:
  instanceType: Standard_NC24ads_A100_v4
  preferredNodes:
  partition:
  labelSelector:
    matchLabels:
      apps:
    matchExpressions:
tuning:
inference:
  adapters:
  config:
  template:
  preset:
    name: phi-4-mini-instruct
    accessMode:
    presetOptions:
      imagePullSecrets:
      modelAccessSecret:
status:
""",
        {"model.name": "phi-4-mini-instruct", "adapters": []},
        command="serve",
    ),
    Written(
        "only annotation commented out",
        serving("{name: w}", '\n  name: w\n  annotations:\n    # kaito.sh/enablelb: "True"'),
        {"served_name": "phi-4"},
    ),
    Written("empty resource", serving(SERVING.splitlines()[3], "resource:"), {"served_name": "phi-4"}),
    Written("preset empty", serving("{name: phi-4}", ""), refused="'inference.preset' is missing"),
    Written(
        "no preset name", serving("name: phi-4", "name:"), refused=r"'inference\.preset\.name' is missing"
    ),
    Written(
        "empty volume beside urls",
        tuning(
            'input: {urls: ["https://example.org/a.parquet"]}', "input: {volumeSource: , urls: [http://a/b]}"
        ),
        {"data.urls": ["http://a/b"]},
    ),
    Written("no method", tuning("  method: qlora\n", "  method:\n"), {"method": "qlora"}),
    Written(
        "empty adapter", SERVING + "  adapters: [{source: }]\n", refused=r"adapters\.0\.source' is missing"
    ),
    # --- where fields belong
    Written(
        "fields below spec",
        """\
apiVersion: kaito.sh/v1alpha1
kind: Workspace
metadata: {name: domain-llama}
spec:
  resource: {instanceType: Standard_NC24ads_A100_v4}
  tuning: {preset: {name: phi-4}}
""",
        refused="a Workspace has no 'spec': write 'resource', 'tuning' one level up",
    ),
    Written("unknown key", SERVING + "replicas: 2\n", refused="unknown key 'replicas'"),
    Written(
        "misspelt metadata",
        serving("{name: w}", "{name: w, lables: {a: b}}"),
        refused=r"did you mean 'labels'",
    ),
    Written("preset beside inference", SERVING + "preset: {name: phi-4}\n", refused="unknown key 'preset'"),
    Written(
        "adapter with volume",
        SERVING + "  adapters: [{source: {name: a, volume: {}}}]\n",
        refused="did you mean 'volumeSource'",
    ),
    Written(
        "resource in inference", SERVING + "  resource: {}\n", refused=r"unknown key 'inference\.resource'"
    ),
    Written(
        "unquoted annotation",
        serving("{name: w}", "{name: w, annotations: {a/b: true}}"),
        refused="a/b' is True",
    ),
    Written(
        "quoted API version of another group",
        serving("kaito.sh/v1beta1", "apps/v1"),
        refused="'apiVersion' is",
    ),
    Written(
        "template and no preset",
        serving("preset: {name: phi-4}", "template: {spec: {}}"),
        refused="pod template",
    ),
    # --- several documents
    Written("with its ConfigMap", SERVING + "  config: mine\n" + VLLM, {"limits.context_tokens": 4096}),
    Written(
        "ConfigMap that no Workspace names",
        SERVING + VLLM,
        {"limits.context_tokens": 4096},
        says="ConfigMap mine is used, but 'inference.config' does not name it",
    ),
    Written(
        "training ConfigMap that no Workspace names",
        TUNING + QLORA,
        {"lora.r": 4},
        says="write 'tuning.config: mine'",
    ),
    Written("ConfigMap before the Workspace", VLLM + "---\n" + SERVING, {"limits.context_tokens": 4096}),
    Written(
        "named ConfigMap missing",
        SERVING + "  config: mine\n",
        refused="'inference.config' names ConfigMap 'mine'",
    ),
    Written(
        "named ConfigMap misspelt",
        SERVING + "  config: min\n" + VLLM,
        refused="ConfigMap 'min', which is not in this file .did you mean 'mine'",
    ),
    Written("stock ConfigMap", SERVING + "  config: inference-params-template\n", {"served_name": "phi-4"}),
    Written(
        "tuning ConfigMap missing",
        TUNING + "  config: mine\n",
        refused="'tuning.config' names ConfigMap 'mine'",
    ),
    Written("tuning ConfigMap", TUNING + "  config: mine\n" + QLORA, {"lora.r": 4}),
    Written(
        "ConfigMap of the other kind",
        TUNING + "  config: mine\n" + VLLM,
        refused="'training_config.yaml' is missing",
    ),
    Written(
        "two ConfigMaps and none named",
        TUNING + QLORA + QLORA.replace("name: mine", "name: other"),
        refused="ConfigMaps mine and other hold 'training_config.yaml'; name the one meant",
    ),
    Written(
        "ConfigMap in another namespace",
        serving("{name: w}", "{name: w, namespace: a}")
        + "  config: mine\n"
        + VLLM.replace("name: mine", "name: mine, namespace: b"),
        refused="ConfigMap mine is in namespace 'b', the Workspace in 'a'",
    ),
    Written(
        "ConfigMap with two documents in it",
        SERVING + "  config: mine\n" + VLLM + "    ---\n    vllm: {}\n",
        refused="holds 2 documents, expected one",
    ),
    Written(
        "ConfigMap of comments", SERVING + VLLM.replace("vllm:", "# vllm:"), {"limits.context_tokens": None}
    ),
    Written(
        "bare configuration as a document",
        TUNING + "---\ntraining_config: {}\n",
        refused="document 2 has no 'kind'; it goes into a ConfigMap",
    ),
    Written(
        "one for tuning, one for serving: tune",
        TUNING + "---\n" + serving("name: w", "name: v"),
        {"name": "w"},
        command="tune",
    ),
    Written(
        "one for tuning, one for serving: serve",
        TUNING + "---\n" + serving("name: w", "name: v"),
        {"served_name": "phi-4"},
        command="serve",
    ),
    Written(
        "two for serving",
        SERVING + "---\n" + serving("name: w", "name: v"),
        refused=r"found w \(inference\), v \(inference\)",
    ),
    Written(
        "list",
        "apiVersion: v1\nkind: List\nitems:\n- " + SERVING.replace("\n", "\n  ").rstrip(" "),
        {"served_name": "phi-4"},
    ),
    Written(
        "list without documents", "apiVersion: v1\nkind: List\nitems: x\n", refused="'items' of List is 'x'"
    ),
    Written(
        "with a Secret",
        SERVING + "---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {a: b}\n",
        {"served_name": "phi-4"},
    ),
    Written("another kind", "apiVersion: kaito.sh/v1beta1\nkind: RAGEngine\n", refused="found RAGEngine"),
    Written("nothing", "# empty\n", refused="found nothing"),
    # --- how it is written
    Written(
        "JSON with tabs",
        '{\n\t"apiVersion": "kaito.sh/v1beta1",\n\t"kind": "Workspace",'
        '\n\t"inference": {"preset": {"name": "phi-4"}}\n}',
        {"served_name": "phi-4"},
        says="'metadata.name' is missing",
    ),
    Written(
        "JSON with a key twice",
        '{"kind": "Workspace", "kind": "List"}',
        refused="key 'kind' is written twice",
    ),
    Written(
        "anchors and merges",
        """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
inference:
  preset: {name: phi-4}
  adapters:
    - source: &first {name: one, image: "myacr.azurecr.io/a:1"}
    - source: {<<: *first, name: two}
""",
        {"served_name": "phi-4"},
    ),
    Written(
        "a key twice",
        SERVING + "  preset: {name: phi-4}\n",
        refused="line 7 not valid YAML: key 'preset' is written",
    ),
    Written(
        "tabs", serving("  preset", "\tpreset"), refused="line 6 not valid YAML: a tab; indent with spaces"
    ),
    Written("endless alias", "kind: &a [*a]\n", refused="stands for more than"),
    Written("Windows line ends", SERVING.replace("\n", "\r\n"), {"served_name": "phi-4"}),
    Written("byte order mark", "\ufeff" + SERVING, {"served_name": "phi-4"}),
    # --- names and sets
    Written(
        "generateName",
        tuning("{name: w}", "{generateName: nightly-}"),
        {"name": "nightly"},
        says="'metadata.generateName' is 'nightly-'",
    ),
    Written(
        "as the cluster returns it",
        serving(
            "{name: w}",
            "{name: w, uid: u, generation: 3, managedFields: [], finalizers: [x], resourceVersion: '4'}",
        )
        + "status: {state: Ready}\n",
        {"served_name": "phi-4"},
        says="without effect, since a cluster writes it: metadata.uid, metadata.generation, "
        "metadata.resourceVersion, metadata.finalizers, status",
    ),
    Written(
        "owned by another object",
        serving(
            "{name: w}",
            "{name: w, ownerReferences: [{apiVersion: v1, kind: X, name: x}], creationTimestamp: null, "
            "annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}}",
        ),
        {"served_name": "phi-4"},
        says="metadata.ownerReferences, metadata.annotations kubectl.kubernetes.io/last-applied-conf",
    ),
    Written(
        "as a controller is about to delete it",
        tuning("{name: w}", "{name: w, deletionTimestamp: '2026-11-30T00:00:00Z', selfLink: /x}"),
        {"name": "w"},
        says="metadata.selfLink, metadata.deletionTimestamp",
    ),
    Written(
        "more adapters than KAITO takes",
        SERVING
        + "  adapters:\n"
        + "".join(f"  - source: {{name: a{n}, image: r.io/a:{n}}}\n" for n in range(11)),
        refused="'inference.adapters' holds 11 adapters, expected 10 at most",
    ),
    Written(
        "another runtime",
        serving("{name: w}", "{name: w, annotations: {kaito.sh/runtime: tgi}}"),
        refused="'metadata.annotations' has kaito.sh/runtime 'tgi', expected vllm or transformers",
    ),
    Written(
        "the runtime in capitals",
        serving("{name: w}", "{name: w, annotations: {kaito.sh/runtime: VLLM}}"),
        {"served_name": "phi-4"},
        says="asks for the vllm runtime",
    ),
    Written(
        "a switch that is no boolean",
        serving("{name: w}", '{name: w, annotations: {kaito.sh/enablelb: "yes"}}'),
        refused="has kaito.sh/enablelb 'yes', expected true or false",
    ),
    Written(
        "a bypass that is no boolean",
        serving("{name: w}", "{name: w, annotations: {kaito.sh/bypass-resource-checks: sure}}"),
        refused="has kaito.sh/bypass-resource-checks 'sure', expected true or false",
    ),
    Written(
        "a switch as Go writes it",
        serving(
            "{name: w}", '{name: w, annotations: {kaito.sh/enablelb: "T", kaito.sh/disable-benchmark: "0"}}'
        ),
        {"served_name": "phi-4"},
        says="kaito.sh/enablelb: only a cluster has it",
    ),
    Written(
        "a switch left empty",
        serving("{name: w}", '{name: w, annotations: {kaito.sh/enablelb: ""}}'),
        {"served_name": "phi-4"},
    ),
    Written(
        "InferenceSet as the cluster returns it",
        """\
apiVersion: kaito.sh/v1alpha1
kind: InferenceSet
metadata: {generateName: w-, uid: u, finalizers: [x]}
spec:
  template:
    metadata: {name: other, namespace: n, labels: {a: b}}
    inference: {preset: {name: phi-4}}
status: {replicas: 1}
""",
        {"served_name": "phi-4"},
        says="metadata.uid, metadata.finalizers, status",
    ),
    Written(
        "InferenceSet with a named template",
        "apiVersion: kaito.sh/v1alpha1\nkind: InferenceSet\nmetadata: {name: w}\nspec:\n"
        "  template: {metadata: {name: other}, inference: {preset: {name: phi-4}}}\n",
        {"served_name": "phi-4"},
        says="without effect in 'spec.template.metadata': name",
    ),
    Written(
        "InferenceSet",
        """\
apiVersion: kaito.sh/v1alpha1
kind: InferenceSet
metadata: {name: w}
spec:
  replicas: 3
  labelSelector: {matchLabels: {apps: x}}
  template:
    resource: {instanceType: Standard_NC24ads_A100_v4}
    inference: {preset: {name: phi-4}}
""",
        {"served_name": "phi-4"},
        says="asks for 3 nodes; here one server runs",
    ),
    Written(
        "InferenceSet with a wrong preset",
        "apiVersion: kaito.sh/v1alpha1\nkind: InferenceSet\nspec: {template: {inference: {presett: {}}}}\n",
        refused=r"unknown key 'inference\.presett'",
    ),
    # --- parts of GPUs
    Written(
        "MIG slice",
        serving("resource: {", "resource: {partition: {mode: mig, profile: 3g.40gb}, "),
        {"served_name": "phi-4"},
    ),
    Written(
        "some of a node's GPUs",
        serving(
            "resource: {instanceType: Standard_NC24ads_A100_v4",
            "resource: {partition: {mode: accelerator, count: 2}, instanceType: Standard_NC96ads_A100_v4",
        ),
        {"served_name": "phi-4"},
    ),
    Written(
        "MIG without a profile",
        serving("resource: {", "resource: {partition: {mode: mig}, "),
        refused="mode mig, which goes with a 'profile'",
    ),
    Written(
        "part of a GPU for tuning",
        tuning("resource: {", "resource: {partition: {mode: mig, profile: 1g.10gb}, "),
        refused="only 'inference' runs on part of a GPU",
    ),
    # --- images that no registry can have
    Written(
        "upper case in the output",
        tuning("myacr.azurecr.io/a:1", "myacr.azurecr.io/Adapters/Phi3:v1"),
        refused="tuning.output.image: .*lower-case repository names",
    ),
    Written(
        "upper case in the data",
        tuning('urls: ["https://example.org/a.parquet"]', 'image: "MyRegistry.azurecr.io/Data/Set:1"'),
        refused="tuning.input.image: .*lower-case",
    ),
    Written(
        "shell variable",
        tuning("myacr.azurecr.io", "$ACR_NAME.azurecr.io"),
        refused="a shell variable in it has not been replaced",
    ),
    Written(
        "scheme in the output",
        tuning("myacr.azurecr.io/a:1", "https://myacr.azurecr.io/a:1"),
        refused="write it without the scheme, as 'myacr.azurecr.io/a:1'",
    ),
    Written(
        "upper case in an adapter",
        SERVING + '  adapters: [{source: {name: a, image: "MyAcr.azurecr.io/Adapters/A:1"}}]\n',
        refused="inference.adapters a: .*lower-case",
    ),
    Written(
        "layout that is not there",
        SERVING + '  adapters: [{source: {name: a, image: "oci:/nowhere/adapters:1"}}]\n',
        refused="inference.adapters a: no OCI layout in directory /nowhere/adapters",
    ),
    # --- what only a cluster has
    Written(
        "options of the preset",
        serving(
            "{name: phi-4}",
            "{name: phi-4, accessMode: private, presetOptions: {image: r.io/x:1, modelWeightsPVC: c}}",
        ),
        {"served_name": "phi-4"},
        says="modelWeightsPVC is 'c', a claim not mounted here",
    ),
    Written(
        "path in a claim that is not named",
        serving("{name: phi-4}", "{name: phi-4, presetOptions: {modelWeightsSubPath: a}}"),
        refused="'modelWeightsSubPath' without 'modelWeightsPVC'",
    ),
    Written(
        "token by Secret",
        serving("{name: phi-4}", "{name: phi-4, presetOptions: {modelAccessSecret: hub}}"),
        says="modelAccessSecret is 'hub', which only a cluster has; set HF_TOKEN",
    ),
    Written("push Secret", TUNING, {"method": "qlora"}, says="names Secret s, which only a cluster has"),
    Written(
        "several nodes",
        serving("resource: {", "resource: {count: 2, "),
        says="asks for 2 nodes; here one server",
    ),
    Written(
        "selector without values",
        serving("{matchLabels: {apps: x}}", "{matchExpressions: [{key: a, operator: In}]}"),
        refused="operator In, which goes with one or more 'values'",
    ),
)
