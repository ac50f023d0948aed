"""Workspaces with slips of the pen: what a dry run makes of them, or the line that it refuses them with."""

from tests.workspace.manifests import SERVING, TUNING, VLLM, Written, serving, tuning

SET = """\
apiVersion: kaito.sh/v1beta1
kind: InferenceSet
metadata: {name: w}
spec:
  replicas: 2
  template:
    resource: {instanceType: Standard_NC24ads_A100_v4}
    inference: {preset: {name: phi-4}}
"""


def adapters(text: str) -> str:
    return f"{SERVING}  adapters: {text}\n"


def adapter(text: str) -> str:
    return adapters(f"[{{source: {{name: a, {text}}}}}]")


def inputs(text: str) -> str:
    return tuning('{urls: ["https://example.org/a.parquet"]}', text)


ODD_DOCUMENTS = (
    # --- kinds and versions
    Written("InferenceSet of v1beta1", SET, {"served_name": "phi-4"}, says="asks for 2 nodes"),
    Written(
        "InferenceSet written like a Workspace",
        SET.replace("spec:\n", "").replace("\n  ", "\n"),
        refused="unknown key 'replicas'; known: apiVersion, kind, metadata, spec, status",
    ),
    Written(
        "InferenceSet that tunes",
        SET.replace("inference: {", "tuning: {"),
        refused="unknown key 'spec.template.tuning'; known: inference, metadata, resource",
        command="serve",
    ),
    Written(
        "InferenceSet with a spec in its template",
        SET.replace("    inference: {", "    spec: {"),
        refused="unknown key 'spec.template.spec'",
    ),
    Written(
        "InferenceSet of none",
        SET.replace("replicas: 2", "replicas: 0"),
        refused="'spec.replicas' is 0: should be greater than or equal to 1",
    ),
    Written(
        "list with an empty item",
        "apiVersion: v1\nkind: List\nitems:\n-\n- " + SERVING.replace("\n", "\n  "),
        refused="'items' of List holds nothing, expected documents",
    ),
    Written("list of nothing", "apiVersion: v1\nkind: List\nitems:\n", refused="found nothing"),
    Written(
        "kind in capitals",
        serving("Workspace", "WORKSPACE"),
        refused=r"found WORKSPACE .did you mean 'Worksp",
    ),
    Written("key of the kind in capitals", serving("kind:", "Kind:"), refused="has the key 'Kind', expected"),
    Written(
        "several kinds", serving("kind: Workspace", "kind: [Workspace]"), refused="has a list as its 'kind'"
    ),
    Written("version without its group", serving("kaito.sh/v1beta1", "v1beta1"), refused="is 'v1beta1', exp"),
    Written(
        "version to come", serving("kaito.sh/v1beta1", "kaito.sh/v1"), refused="is 'kaito.sh/v1', expect"
    ),
    # --- values of another type
    Written(
        "preset without its name key",
        serving("{name: phi-4}", "phi-4"),
        refused=r"'inference\.preset' is 'phi-4', expected keys and values$",
    ),
    Written(
        "name that is a number", serving("name: w", "name: 4"), refused=r"name' is 4, expected text, writ"
    ),
    Written("name that is empty", serving("name: w", "name: ''"), refused="is '', expected text that is not"),
    Written(
        "preset that is empty", serving("phi-4", "''"), refused="'inference.preset.name' is '', expected"
    ),
    Written(
        "label that is a number",
        serving("apps: x", "apps: 1"),
        refused=r"matchLabels\.apps' is 1, expected text, written in quotes",
    ),
    Written(
        "label key that is a number",
        serving("apps: x", "1: x"),
        refused=r"the key 1 in '.*' is no text; write it in quotes",
    ),
    Written(
        "key that is a number", SERVING + "1: 2\n", refused="the key 1 in '1' is no text; write it in quo"
    ),
    Written(
        "date for a text",
        serving("phi-4", "!!timestamp 2024-01-01"),
        refused="is the date 2024-01-01, expected text",
    ),
    Written("count in quotes", serving("resource: {", "resource: {count: '2', "), says="asks for 2 nodes"),
    Written(
        "count in words", serving("resource: {", "resource: {count: two, "), refused="'two', expected a whole"
    ),
    Written(
        "count and a half", serving("resource: {", "resource: {count: 1.5, "), refused="1.5, expected a whole"
    ),
    Written(
        "count of true", serving("resource: {", "resource: {count: true, "), refused="is true, expected a num"
    ),
    Written(
        "count beyond Kubernetes' numbers",
        serving("resource: {", "resource: {count: 3000000000, "),
        refused="'resource.count' is 3000000000: should be less than or equal to 2147483647",
    ),
    Written(
        "count like a time", serving("resource: {", "resource: {count: 1:30, "), refused="is '1:30', expected"
    ),
    Written(
        "count of 5,000 digits",
        serving("resource: {", f"resource: {{count: {'9' * 5000}, "),
        refused="line 4 not valid YAML: '9+[^ ]* cannot be read as int$",
    ),
    Written(
        "count of 5,000 digits in JSON",
        f'{{"kind": "Workspace", "resource": {{"count": {"9" * 5000}}}}}',
        refused="a number of more than 4,300 digits",
    ),
    Written(
        "one preferred node",
        serving("resource: {", "resource: {preferredNodes: node1, "),
        refused=r"'node1', expected a list, as in \[a, b\]",
    ),
    Written(
        "MIG slice by its resource's name",
        serving("resource: {", "resource: {partition: {mode: mig, profile: nvidia.com/mig-1g.10gb}, "),
        refused="is 'nvidia.com/mig-1g.10gb', expected a MIG slice such as 1g.10gb",
    ),
    # --- adapters, data and results
    Written(
        "strength in quotes",
        adapters("[{source: {name: a, image: r.io/a:1}, strength: '0.5'}]"),
        {"adapters": [{"name": "a", "reference": "r.io/a:1", "strength": 0.5}]},
    ),
    Written(
        "strength in per cent",
        adapters("[{source: {name: a, image: r.io/a:1}, strength: 50%}]"),
        refused=r"adapters\.0\.strength' is '50%'",
    ),
    Written(
        "strength of true",
        adapters("[{source: {name: a, image: r.io/a:1}, strength: true}]"),
        refused="is true, expected a number",
    ),
    Written(
        "adapter without a source",
        adapters("[{name: a, image: r.io/a:1}]"),
        refused=r"unknown key 'inference\.adapters\.0\.name'; known: source, strength",
    ),
    Written("adapters that are no list", adapters("{source: {}}"), refused="is a mapping, expected a list"),
    Written(
        "pull Secrets written like a pod's",
        adapter("image: r.io/a:1, imagePullSecrets: [{name: s}]"),
        refused=r"imagePullSecrets\.0' is a mapping, expected text",
    ),
    Written(
        "adapter in a claim",
        adapter("volumeSource: {persistentVolumeClaim: {claimName: c}}"),
        says="is no hostPath and nothing is mounted at /mnt/adapter/a; give --adapter a=DIR here",
    ),
    Written(
        "result in a claim",
        tuning(
            '{image: "myacr.azurecr.io/a:1", imagePushSecret: s}',
            "{volumeSource: {persistentVolumeClaim: {claimName: c}}}",
        ),
        says="tuning.output.volumeSource is no hostPath: the result is left on this machine",
    ),
    Written(
        "result by its digest",
        tuning("myacr.azurecr.io/a:1", f"myacr.azurecr.io/a@sha256:{'0' * 64}"),
        refused="tuning.output.image: .* names an image that is there already; name the new one by a tag",
    ),
    Written("one address", inputs("{urls: https://a/b}"), refused="is 'https://a/b', expected a list, as in"),
    Written(
        "address with a space", inputs("{urls: ['https://a/b c']}"), refused="'https://a/b c', expected addr"
    ),
    Written(
        "address with a wrong port", inputs("{urls: ['https://h:99999/x']}"), refused="'https://h:99999/x', e"
    ),
    Written(
        "address with one bracket", inputs("{urls: ['https://[a/x']}"), refused=r"holds 'https://\[a/x', e"
    ),
    Written(
        "template beside a preset",
        SERVING + "  template: {spec: {containers: []}}\n",
        refused="'inference' has both 'preset' and 'template', expected one",
    ),
    # --- what is beside
    Written(
        "configuration that is no text",
        SERVING
        + "  config: mine\n---\nkind: ConfigMap\nmetadata: {name: mine}\ndata: {inference_config.yaml: {}}\n",
        refused=r"ConfigMap mine: 'data' has a mapping as 'inference_config\.yaml', expected text; write '",
    ),
    Written(
        "ConfigMap without a name", SERVING + VLLM.replace("name: mine", ""), refused="ConfigMap: 'metadata'"
    ),
    # --- how it is written
    Written(
        "Helm's variable", serving("phi-4", "{{ .Values.model }}"), refused="line 6 .* render the template"
    ),
    Written(
        "a shell's variable", serving("phi-4", "${MODEL}"), refused="line 6 .* render the template first"
    ),
    Written(
        "no space after a colon", serving("name: phi-4", "name:phi-4"), refused="unknown key '.*name:phi-4'"
    ),
    Written("no-break space", serving("name: phi-4", "name:\u00a0phi-4"), refused="unknown key '.*phi-4'"),
    Written("unknown key left empty", SERVING + "replicas:\n", refused="unknown key 'replicas'"),
    Written("byte order mark in the middle", f"{SERVING}---\n\ufeff# b\n", {"served_name": "phi-4"}),
    Written(
        "two JSON objects",
        '{"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "w"},\n'
        '\t"inference": {"preset": {"name": "phi-4"}}}\n{"kind": "Service"}\n',
        {"served_name": "phi-4"},
    ),
    Written("empty documents between", f"---\n---\n# c\n---\n{SERVING}---\n...\n", {"served_name": "phi-4"}),
    Written("tag of a text", serving("phi-4", "!!str phi-4"), {"served_name": "phi-4"}),
    Written(
        "tag that does not fit", serving("phi-4", "!!bool phi-4"), refused="line 6 .*'phi-4' cannot be read"
    ),
    Written(
        "tag of a date that is none", serving("phi-4", "!!timestamp x"), refused="line 6 .*'x' cannot be re"
    ),
    Written(
        "tag that runs code", serving("phi-4", "!!python/name:os.system x"), refused="line 6 .*python/name"
    ),
    Written("alias of nothing", serving("{name: phi-4}", "*x"), refused="line 6 .*undefined alias 'x'"),
    Written("100,000 brackets", "kind: " + "[" * 100_000, refused="line 1 not valid YAML: nested too deeply"),
    Written("old line ends", SERVING.replace("\n", "\r"), {"served_name": "phi-4"}),
    Written("code fence", f"```yaml\n{SERVING}```\n", refused="line 1 not valid YAML: found character '`'"),
    Written(
        "with notes of a controller",
        TUNING.replace("{name: w}", "{name: w, annotations: {workspace.kaito.io/revision: '1'}}"),
        {"name": "w"},
    ),
)
