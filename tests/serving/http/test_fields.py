"""The table of fields: complete, and the one that docs/http.md shows.

To write the page's tables anew: `python -m tests.serving.http.test_fields`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import ChatCompletionAssistantMessageParam
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as response

from runtime.serving.http import fields, messages
from runtime.serving.http.anthropic_body import MessagesBody
from runtime.serving.http.body_types import Body
from runtime.serving.http.fields import Treatment, near_miss
from runtime.serving.http.responses_body import ResponsesBody
from runtime.serving.http.schema import ChatBody, ChatCompletionBody, CompletionBody, GenerateFields

PAGE = Path(__file__).parents[3] / "docs/http.md"
START, END = "<!-- fields -->\n", "<!-- /fields -->\n"
ROUTES: dict[str, type[Body]] = {
    "/chat": ChatBody,
    "/v1/chat/completions": ChatCompletionBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
}
VLLM = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
chat_template_kwargs continue_final_message documents early_stopping echo frequency_penalty
guided_decoding_backend ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params
length_penalty logit_bias logprobs max_completion_tokens max_tokens media_io_kwargs min_p min_tokens
mm_processor_kwargs model n parallel_tool_calls presence_penalty priority prompt_cache_key prompt_embeds
prompt_logprobs reasoning reasoning_effort repetition_detection repetition_penalty request_id
response_format return_assistant_tokens_mask return_prompt_text return_token_ids return_token_offsets
return_tokens_as_token_ids seed service_tier skip_special_tokens spaces_between_special_tokens stop
stop_token_ids store stream stream_options structured_outputs suffix temperature thinking_token_budget
tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens truncation truncation_side
use_beam_search user vllm_xargs
"""
"""What vLLM 0.25.1's requests may have (vllm/entrypoints/openai/*/protocol.py), but for the input itself."""
LLAMA_CPP = """
adaptive_decay adaptive_target add_generation_prompt backend_sampling cache_prompt chat_format
chat_template_kwargs dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dry_sequence_breakers
dynatemp_exponent dynatemp_range frequency_penalty grammar grammar_lazy grammar_triggers id_slot
ignore_eos image_data input_extra input_prefix input_suffix json_schema logit_bias lora max_tokens
min_keep min_p mirostat mirostat_eta mirostat_tau n n_cache_reuse n_cmpl n_discard n_indent n_keep
n_predict n_probs parallel_tool_calls parse_tool_calls post_sampling_probs presence_penalty
preserved_tokens reasoning_budget_tokens reasoning_format reasoning_in_content repeat_last_n
repeat_penalty response_fields response_format return_progress return_tokens samplers seed
speculative.n_max speculative.n_min speculative.p_min stop stream t_max_predict_ms temperature
thinking_budget_tokens thinking_forced_open timings_per_token tool_choice tools top_k top_n_sigma top_p
typ_p typical_p xtc_probability xtc_threshold
"""
SGLANG = """
custom_logit_processor custom_params ebnf frequency_penalty ignore_eos input_embeds input_ids json_schema
lora_path max_new_tokens min_new_tokens min_p no_stop_trim presence_penalty regex repetition_penalty
return_hidden_states return_logprob sampling_params skip_special_tokens spaces_between_special_tokens stop
stop_regex stop_token_ids stream structural_tag temperature text top_k top_p
"""
"""What SGLang's `sampling_params` and `/generate` take that changes an answer."""
TGI = """
adapter_id best_of decoder_input_details details do_sample frequency_penalty grammar guideline inputs
logit_bias logprobs max_new_tokens max_tokens model n presence_penalty repetition_penalty response_format
return_full_text seed stop stream suffix temperature tool_choice tool_prompt tools top_k top_logprobs
top_n_tokens top_p truncate typical_p watermark
"""


def names_of(body: type[Body]) -> set[str]:
    return {field.alias or name for name, field in body.model_fields.items()}


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def routes_of(routes: Iterable[str]) -> str:
    routes = list(routes)
    return "all" if len(routes) == len(ROUTES) else ", ".join(f"`{route}`" for route in routes)


def tables() -> str:
    """Return the page's three tables."""
    carried = defaultdict(list)
    others: dict[tuple[str, Treatment], list[str]] = defaultdict(list)
    for name in sorted(set().union(*(names_of(b) | b.treatments.keys() for b in ROUTES.values()))):
        if on := [route for route, body in ROUTES.items() if name in names_of(body)]:
            carried[routes_of(on)].append(name)
        elsewhere = defaultdict(list)
        for route, body in ROUTES.items():
            if route not in on and name in body.treatments:
                elsewhere[body.treatments[name]].append(route)
        for treatment, on_these in elsewhere.items():
            others[routes_of(on_these), treatment].append(name)
    lines = ["### Carried out\n", "| fields | routes |", "|---|---|"]
    lines += [f"| {listed(names)} | {routes} |" for routes, names in sorted(carried.items())]
    for effect, title in ((False, "No effect"), (True, "Refused")):
        lines += [f"\n### {title}\n", "| fields | routes | why |", "|---|---|---|"]
        for (routes, treatment), names in sorted(
            others.items(), key=lambda item: (item[0][1].why, item[0][0])
        ):
            if treatment.effect is effect:
                asks = ", ".join(f"`{json.dumps(value)}`" for value in treatment.neutral)
                unless = f"; {asks} asks for nothing" if effect and asks else ""
                lines.append(f"| {listed(names)} | {routes} | {treatment.why}{unless} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0] == tables()


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (ChatCompletionBody, set(chat.CompletionCreateParamsBase.__annotations__)),
        (CompletionBody, set(completion.CompletionCreateParamsBase.__annotations__)),
        (ResponsesBody, set(response.ResponseCreateParamsBase.__annotations__)),
        (ChatCompletionBody, set(VLLM.split())),
        (CompletionBody, set(VLLM.split())),
        (ChatCompletionBody, set(LLAMA_CPP.split())),
        (CompletionBody, set(LLAMA_CPP.split())),
        (ChatCompletionBody, set(TGI.split())),
        (ChatCompletionBody, set(SGLANG.split())),
        (ChatBody, set(SGLANG.split())),
        (
            messages.Message,
            set(ChatCompletionAssistantMessageParam.__annotations__),
        ),
    ],
)
def test_every_field_that_another_server_takes_has_a_treatment(body: type[Body], sent: set[str]) -> None:
    assert len(sent) > 5
    assert not sent - names_of(body) - body.treatments.keys()


def test_every_parameter_of_generate_has_a_treatment() -> None:
    from transformers import GenerationConfig

    sent = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert not sent - names_of(GenerateFields) - GenerateFields.treatments.keys()


def test_no_treatment_is_of_a_field_that_every_route_carries_out() -> None:
    everywhere = set.intersection(*(names_of(body) for body in ROUTES.values()))
    assert not everywhere & fields.GENERATION.keys()


@pytest.mark.parametrize(
    ("neutral", "value", "refused"),
    [
        ((False,), True, True),
        ((False,), False, False),
        ((False,), 0, True),
        ((False,), None, False),
        ((True,), False, True),
        ((True,), True, False),
        ((True,), 1, True),
        ((1,), 1.0, False),
        ((1,), True, True),
        ((0,), False, True),
        ((), False, True),
        ((("text",),), ["text"], False),
        ((["text"],), ["text", "audio"], True),
        ((), "", False),
        ((), [], False),
        ((), {"a": 1}, True),
    ],
)
def test_a_value_that_asks_for_nothing_is_not_refused(
    neutral: tuple[object, ...], value: object, refused: bool
) -> None:
    assert Treatment("why", effect=True, neutral=neutral).refuses(value) is refused


@pytest.mark.parametrize("route", ROUTES)
def test_a_field_that_one_route_carries_out_is_known_to_the_others(route: str) -> None:
    everywhere = set().union(*map(names_of, ROUTES.values()))
    assert not everywhere - names_of(ROUTES[route]) - ROUTES[route].treatments.keys()


@pytest.mark.parametrize("route", ROUTES)
def test_a_refusal_names_a_field_that_its_route_carries_out(route: str) -> None:
    body = ROUTES[route]
    named = {
        name
        for treatment in body.treatments.values()
        if treatment.effect and " of /" not in treatment.why
        for name in re.findall(r"(?:use|send|as|by|or|and) '([a-z_]+)'", treatment.why)
    }
    assert len(named) > 5
    assert not named - names_of(body)


@pytest.mark.parametrize("name", sorted(fields.GENERATION))
def test_no_known_name_is_taken_for_a_misspelling_of_itself(name: str) -> None:
    assert near_miss(name, (name, "something_else")) == name


@pytest.mark.parametrize(
    "name", ["session_id", "trace_id", "tags", "timeout", "extra", "top_secret", "prompt_id", "x" * 500]
)
def test_names_of_other_things_are_no_misspellings(name: str) -> None:
    known = (*names_of(ChatCompletionBody), *fields.refused(fields.GENERATION))
    assert near_miss(name, known) is None


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    PAGE.write_text(before + START + tables() + END + after, encoding="utf-8")
