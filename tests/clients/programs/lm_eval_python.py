"""lm-evaluation-harness: ten questions scored by our server and by its own model, with its code for both.

It needs torch and transformers, so it runs where these are, and finds lm_eval in the folder that it is told.
"""

import json
import sys

url, model, tasks, packages = sys.argv[1:]
sys.path.append(packages)  # behind all others

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def score(kind: str, **arguments) -> dict:
    found = simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["ten"],
        batch_size=8,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
    )
    samples = sorted(found["samples"]["ten"], key=lambda sample: sample["doc_id"])
    return {
        "accuracy": found["results"]["ten"]["acc,none"],
        "likelihoods": [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples],
        "greedy": [[str(answer[0][1]) for answer in sample["resps"]] for sample in samples],
    }


print(
    json.dumps(
        {
            "own": score("hf", pretrained=model, device="cpu", dtype="float32"),
            "served": score(
                "local-completions",
                model="tiny",
                base_url=url + "/v1/completions",
                tokenizer=model,
                tokenizer_backend="huggingface",
                max_retries=1,
            ),
        }
    )
)
