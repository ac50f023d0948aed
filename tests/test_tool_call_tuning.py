"""Rows with tool calls teach calls: the tuned demo model answers an unseen question with its call."""

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.model_source import ModelSource
from runtime.tuning import launcher
from runtime.tuning.settings import Lora
from tests.serving.conftest import Process
from tests.tuning.conftest import tiny_job

pytestmark = [pytest.mark.long, pytest.mark.model]

TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""ChatML with tools, whose calls serving finds (serving/tool_calls.py)."""

PARAMETERS = {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]}
TOOLS = [{"type": "function", "function": {"name": "order_status", "parameters": PARAMETERS}}]
WAYS = ("Where is order {}?", "Status of {} please", "Has {} left yet?")


def conversation(number: int) -> list[dict[str, Any]]:
    """Return a question about an order, the call that it takes, its result and the answer."""
    draw = random.Random(number)
    order, state = f"B{draw.randint(1, 99999):05}", draw.choice(["shipped", "delayed", "packing"])
    function = {"name": "order_status", "arguments": json.dumps({"order_id": order})}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return [
        {"role": "user", "content": draw.choice(WAYS).format(order)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"status": state})},
        {"role": "assistant", "content": f"Order {order} is {state}."},
    ]


@pytest.fixture(scope="module")
def adapter(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 12 steps on 48 conversations."""
    root = tmp_path_factory.mktemp("calls")
    rows = [json.dumps({"messages": conversation(number), "tools": TOOLS}) for number in range(48)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    training = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1,
    }  # fmt: skip
    source = ModelSource(name="demo", path=demo_model_dir, chat_template=TEMPLATE)
    job = tiny_job(
        demo_model_dir, root, root / "out", model=source, lora=Lora(r=16, alpha=32), training=training,
        method="lora", quantization=None,
    )  # fmt: skip
    launcher.run(job, processes=1)
    return root / "out"


def test_a_held_out_question_is_answered_with_its_call(demo_model_dir: Path, adapter: Path) -> None:
    site = Process.serve(demo_model_dir, "--adapter", f"orders={adapter}")
    try:
        site.wait_ready(180)
        for number in range(1000, 1005):
            asked, called, *_ = conversation(number)
            body = {
                "model": "orders",
                "messages": [asked],
                "tools": TOOLS,
                "max_tokens": 60,
                "temperature": 0,
            }
            (choice,) = httpx.post(site.url + "/v1/chat/completions", json=body, timeout=120).json()[
                "choices"
            ]
            expected = called["tool_calls"][0]["function"]
            (found,) = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls"
            assert found["function"]["name"] == expected["name"]
            assert json.loads(found["function"]["arguments"]) == json.loads(expected["arguments"])
    finally:
        site.close()
