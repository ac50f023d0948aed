"""What becomes of fields that clients send for other servers and that no body here carries out.

A field that would change the answer is refused by name, unless its value asks for nothing; one that has no
effect on the answer is ignored. The names are those of OpenAI's API, vLLM 0.25, SGLang, llama.cpp's server,
TGI and transformers' `generate` (KAITO's /chat). A field of a body (schema.py) is carried out, whatever
stands here. docs/http.md shows the table to users. Knows no JSON. Start at `Treatment`, then `GENERATION`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MOST_UNKNOWN = 64
"""Unknown names that one request may have: each is compared with all that are known."""
MOST_LISTED = 16
"""Unknown names that an answer lists."""

LONGEST_NAME = 64
NEAR = 0.84
"""difflib's ratio from which a name is taken for a misspelling: one letter in six."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of one field: `why` it has no effect, or why and when it is refused."""

    why: str
    effect: bool = False
    """Whether the field changes the answer: then it is refused."""
    neutral: tuple[Any, ...] = (False,)
    """Values that ask for nothing, beside null and what is empty."""

    def refuses(self, value: Any) -> bool:
        """Return whether a request with this value must be refused."""
        if not self.effect or value is None or value in ("", [], {}):
            return False
        sent = tuple(value) if type(value) is list else value
        return not any(type(sent) in _kinds(one) and sent == one for one in self.neutral)


Treatments = Mapping[str, Treatment]


def _kinds(value: Any) -> tuple[type, ...]:
    """Return the types that a value may have to be the same as this one: 1 is 1.0 and is not true."""
    return (int, float) if type(value) in (int, float) else (type(value),)


@dataclass(slots=True)
class UnknownFields:
    """The unknown names of one request."""

    names: dict[str, None] = field(default_factory=dict)

    def add(self, name: str) -> bool:
        """Note a name; False when it is one more than `MOST_UNKNOWN`."""
        self.names[re.sub(r"[^A-Za-z0-9_.-]", "?", name[:LONGEST_NAME])] = None
        return len(self.names) <= MOST_UNKNOWN

    def listed(self) -> str:
        """Return the first `MOST_LISTED` names for a header, with dots where there are more."""
        return ", ".join([*self.names][:MOST_LISTED] + ["..."] * (len(self.names) > MOST_LISTED))


def refused(treatments: Treatments) -> Iterable[str]:
    """Return the names that may be refused."""
    return (name for name, treatment in treatments.items() if treatment.effect)


@lru_cache(1024)
def near_miss(name: str, known: tuple[str, ...]) -> str | None:
    """Return the known name that `name` is a misspelling of: max_token, maxTokens, temprature."""
    if len(name) > LONGEST_NAME:
        return None
    plain = _plainly(known)
    if (same := plain.get(_plain(name))) is not None:
        return same
    close = difflib.get_close_matches(_plain(name), plain, 1, NEAR)
    return plain[close[0]] if close else None


@lru_cache
def _plainly(known: tuple[str, ...]) -> dict[str, str]:
    return {_plain(one): one for one in known}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _ignored(why: str, *names: str) -> dict[str, Treatment]:
    return dict.fromkeys(names, Treatment(why))


def _refused(why: str, *names: str, neutral: tuple[Any, ...] = (False,)) -> dict[str, Treatment]:
    return dict.fromkeys(names, Treatment(why, effect=True, neutral=neutral))


_BOOKKEEPING = {
    **_ignored(
        "it says who asks, and the answer does not depend on it", "user", "safety_identifier", "metadata"
    ),
    **_ignored(
        "nothing is stored", "store", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"
    ),
    **_ignored("requests are answered in the order of their arrival", "service_tier", "priority"),
    **_ignored("send the header x-request-id", "request_id"),
    **_ignored("the prefix cache is one, and always used", "cache_prompt", "id_slot", "n_cache_reuse"),
    **_refused("the prefix cache is one, and cannot be divided", "cache_salt"),
    **_ignored("caches are not moved between servers", "kv_transfer_params"),
    **_ignored("it speeds an answer up and does not change it", "prediction", "backend_sampling"),
    **_ignored("text is all that is taken in", "media_io_kwargs", "mm_processor_kwargs"),
    **_ignored("GET /metrics has times", "timings_per_token", "return_progress"),
    **_ignored(
        "a prompt that does not fit is refused, never cut",
        "truncation",
        "truncation_side",
        "n_keep",
        "n_discard",
    ),
}

_SAMPLING = {
    **_refused("beam search is not offered", "use_beam_search"),
    **_refused("beam search is not offered", "num_beams", "num_beam_groups", "beam_width", neutral=(0, 1)),
    **_ignored("it belongs to beam search", "length_penalty", "early_stopping", "diversity_penalty"),
    **_refused("this kind of sampling is not offered", "top_a", "top_n_sigma", neutral=(0, -1)),
    **_refused("this kind of sampling is not offered", "typical_p", "typ_p", "tfs_z", "top_h", neutral=(1,)),
    **_refused(
        "this kind of sampling is not offered", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", neutral=(0,)
    ),
    **_refused(
        "this kind of sampling is not offered", "mirostat", "dynatemp_range", "dry_multiplier", neutral=(0,)
    ),
    **_refused("this kind of sampling is not offered", "xtc_probability", "min_keep", neutral=(0,)),
    **_refused("this kind of sampling is not offered", "adaptive_target", neutral=(-1,)),
    **_refused("samplers are applied in one order", "samplers"),
    **_ignored("it belongs to a kind of sampling that is not offered", "mirostat_tau", "mirostat_eta"),
    **_ignored("it belongs to a kind of sampling that is not offered", "dynatemp_exponent", "xtc_threshold"),
    **_ignored("it belongs to a kind of sampling that is not offered", "dry_base", "dry_allowed_length"),
    **_ignored(
        "it belongs to a kind of sampling that is not offered", "dry_penalty_last_n", "dry_sequence_breakers"
    ),
    **_ignored("it belongs to a kind of sampling that is not offered", "adaptive_decay"),
    **_refused("use 'repetition_penalty'", "repeat_penalty", neutral=(1,)),
    **_ignored("a repetition penalty looks at all tokens", "repeat_last_n"),
    **_refused("logits are not processed by code of the request", "logits_processors", "vllm_xargs"),
    **_refused(
        "logits are not processed by code of the request",
        "logits_processor",
        "custom_logit_processor",
        "custom_params",
        "prefix_allowed_tokens_fn",
    ),
    **_refused("use 'seed'", "random_seed", neutral=()),
    **_refused("use 'logit_bias'", "sequence_bias"),
    **_refused("it is not offered", "force_words_ids", "constraints", "suffix"),
    **_refused("it is not offered", "encoder_no_repeat_ngram_size", neutral=(0,)),
    **_refused("it is not offered", "encoder_repetition_penalty", "guidance_scale", neutral=(1,)),
    **_refused("it is not offered", "watermark", "watermarking_config", "token_healing", "dola_layers"),
    **_refused("it is not offered", "exponential_decay_length_penalty", "repetition_detection"),
    **_refused("it is not offered", "negative_prompt_ids", "negative_prompt_attention_mask", "prompt_embeds"),
    **_refused("it is not offered", "forced_bos_token_id", "n_indent", neutral=(0,)),
}

_LENGTH = {
    **_refused(
        "use 'max_tokens'", "n_predict", "max_new_tokens", "max_output_tokens", "max_gen_len", neutral=(-1,)
    ),
    **_refused("use 'max_tokens'", "max_completion_tokens", "max_tokens", "max_length", neutral=(-1,)),
    **_refused("use 'max_tokens'", "max_tokens_to_sample", "num_predict", neutral=(-1,)),
    **_refused("use 'min_tokens'", "min_length", "min_new_tokens", neutral=(0,)),
    **_refused("use 'stop'", "stop_strings", "stop_sequences"),
    **_refused("use 'include_stop_str_in_output'", "no_stop_trim"),
    **_refused(
        "answers end by 'stop' and 'stop_token_ids'", "stop_regex", "stopping_criteria", "custom_generate"
    ),
    **_refused("use 'temperature', which is greedy at 0", "do_sample", neutral=()),
    **_refused("answers end by tokens, not by time", "max_time", "t_max_predict_ms", neutral=(0, -1)),
    **_refused("a prompt that does not fit is refused, never cut", "truncate_prompt_tokens", "truncate"),
    **_refused("a prompt that does not fit is refused, never cut", "handle_long_generation"),
    **_ignored(
        "special tokens are never part of an answer", "spaces_between_special_tokens", "preserved_tokens"
    ),
}

_FORM = {
    **_refused(
        "use 'response_format' or 'structured_outputs'", "structural_tag", "grammar_lazy", "grammar_triggers"
    ),
    **_refused("use 'response_format'", "schema", "response_schema", "response_json_schema", "output_schema"),
    **_refused("use 'response_format'", "output_format", "output_config"),
    **_refused("use 'response_format'", "json", "json_object", "json_mode", "format", "response_mime_type"),
    **_refused("use 'guided_choice'", "choice", "choices"),
    **_refused("use 'structured_outputs'", "guided_decoding", "guided_options_request"),
    **_ignored("one library compiles all schemas", "guided_decoding_backend"),
}

_TEMPLATE = {
    **_refused(
        "a template comes from the model, never from a request", "chat_template", "tool_prompt", "guideline"
    ),
    **_refused(
        "templates are rendered without arguments of the request", "chat_template_kwargs", "documents"
    ),
    **_refused("use 'chat_template_kwargs' of /v1/chat/completions", "enable_thinking", "thinking"),
    **_refused("the assistant always begins a new turn", "continue_final_message"),
    **_refused("the assistant always begins a new turn", "add_generation_prompt", neutral=(True,)),
    **_refused(
        "a text gets the tokenizer's opening tokens, a conversation the template's", "add_special_tokens"
    ),
    **_refused("send a message of role 'system'", "system", "system_prompt", "instructions"),
    **_refused("the model decides how long it thinks", "thinking_token_budget", "thinking_budget_tokens"),
    **_refused("the model decides how long it thinks", "reasoning_budget_tokens", "thinking_forced_open"),
    **_ignored("the model decides how long it thinks", "reasoning_effort", "reasoning"),
    **_ignored("reasoning has a field of its own, or is not separated", "include_reasoning"),
    **_refused("reasoning has a field of its own", "reasoning_in_content"),
    **_refused(
        "reasoning has a field of its own", "reasoning_format", neutral=("auto", "deepseek", "parsed")
    ),
    **_refused("the model decides how long it answers", "verbosity", neutral=("medium",)),
    **_refused("text is all that is taken in", "image_data", "input_extra", "input_prefix", "input_suffix"),
}

_OUTPUT = {
    **_refused("text is all that is answered", "audio", "modalities", neutral=(("text",),)),
    **_refused("no tool is run here", "web_search_options", "moderation"),
    **_refused("several calls in one answer cannot be prevented", "parallel_tool_calls", neutral=(True,)),
    **_refused("tools are taken by /v1/chat/completions", "tools", "tool_choice", neutral=("auto", "none")),
    **_refused("function calls are always found", "parse_tool_calls", neutral=(True,)),
    **_refused("one answer to a request", "n", "best_of", "n_cmpl", "num_return_sequences", neutral=(0, 1)),
    **_refused(
        "it is not offered", "logprobs", "top_logprobs", "prompt_logprobs", "n_probs", neutral=(False, 0)
    ),
    **_refused("it is not offered", "post_sampling_probs", "top_n_tokens", neutral=(False, 0)),
    **_refused("the answer never repeats the prompt", "echo", "return_full_text", "return_prompt_text"),
    **_refused("token ids are not part of an answer", "return_token_ids", "return_tokens_as_token_ids"),
    **_refused("token ids are not part of an answer", "return_tokens", "return_token_offsets"),
    **_refused("token ids are not part of an answer", "return_assistant_tokens_mask", "details"),
    **_refused("token ids are not part of an answer", "decoder_input_details"),
    **_refused("an answer has all its fields", "response_fields"),
    **_refused("choose an adapter by its name as 'model'", "lora", "adapter_id", "adapter"),
    **_refused("choose an adapter by its name as 'model'", "lora_path", "lora_request"),
    **_refused("text is all that is answered", "detokenize", neutral=(True,)),
    **_refused("it is not offered", "return_logprob", "return_hidden_states", "return_sequences"),
    **_refused(
        "its fields stand in the body itself",
        "extra_body",
        "sampling_params",
        "generation_config",
        "generation_kwargs",
        "generate_kwargs",
        "parameters",
        "options",
    ),
    **_ignored("streams carry it by themselves, or nothing does", "stream_options", "chat_format"),
}

_GENERATE = {
    **_ignored("it does not change the text", "clean_up_tokenization_spaces", "renormalize_logits"),
    **_ignored(
        "it does not change the text",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "low_memory",
        "max_cache_len",
    ),
    **_ignored(
        "it does not change the text",
        "compile_config",
        "disable_compile",
        "synced_gpus",
        "return_legacy_cache",
    ),
    **_ignored(
        "it does not change the text", "remove_invalid_values", "prefill_chunk_size", "transformers_version"
    ),
    **_ignored(
        "the text is all that is answered", "output_attentions", "output_hidden_states", "output_scores"
    ),
    **_ignored("the text is all that is answered", "output_logits", "return_dict_in_generate"),
    **_ignored("the tokenizer has it", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    **_ignored(
        "it speeds an answer up and does not change it",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "speculation_type",
        "use_mtp",
        "speculative.n_max",
        "speculative.n_min",
        "speculative.p_min",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "use_model_defaults",
        "continuous_batching_config",
    ),
}

GENERATION: Treatments = {
    **_BOOKKEEPING,
    **_SAMPLING,
    **_LENGTH,
    **_FORM,
    **_TEMPLATE,
    **_OUTPUT,
    **_GENERATE,
}
"""For every route that generates; the fields of its body go first."""

_INPUTS = ("input", "inputs", "input_data", "input_ids", "input_embeds")
_TEMPLATED = _refused("/chat takes it, for a prompt without the template", "raw", "prefix")
_CALLS = _refused(
    "tools are taken by /v1/chat/completions", "functions", "function_call", neutral=("auto", "none")
)

CHAT: Treatments = {
    **GENERATION,
    **_CALLS,
    **_refused("send 'prompt', or 'messages'", *_INPUTS, "text"),
    **_refused("it is not offered", "include"),
}
"""For /chat."""

CHAT_COMPLETION: Treatments = {
    **GENERATION,
    **_TEMPLATED,
    **_refused("send 'messages'", *_INPUTS, "prompt", "text"),
    **_refused("use 'n'", "best_of", "n_cmpl", "num_return_sequences", neutral=(0, 1)),
    **_refused("use 'logprobs'", "include"),
}

COMPLETION: Treatments = {
    **GENERATION,
    **_TEMPLATED,
    **_CALLS,
    **_refused("send 'prompt'", *_INPUTS, "messages", "text"),
    **_refused("use 'n'", "n_cmpl", "num_return_sequences", neutral=(0, 1)),
    **_refused("use 'logprobs'", "include"),
}

RESPONSES: Treatments = {
    **GENERATION,
    **_TEMPLATED,
    **_CALLS,
    **_refused("send 'input'", "messages", "inputs", "input_data", "input_ids", "input_embeds"),
    **_refused(
        "use 'max_output_tokens'",
        *(name for name, treatment in _LENGTH.items() if treatment.why == "use 'max_tokens'"),
        neutral=(-1,),
    ),
    **_refused("nothing is stored", "previous_response_id", "conversation", "background", "prompt"),
    **_refused("nothing is stored", "background_options", "context_management", "previous_input_messages"),
    **_refused("it is not offered", "access_programs", "image", "enable_response_messages"),
    **_ignored("it counts calls of tools that OpenAI runs", "max_tool_calls"),
}

ANTHROPIC: Treatments = {
    **GENERATION,
    **_TEMPLATED,
    **_refused("send 'messages'", *_INPUTS, "prompt", "text"),
    **_refused("use 'tools' and 'tool_choice'", "functions", "function_call", neutral=("auto", "none")),
    **_refused("use 'tool_choice.disable_parallel_tool_use'", "parallel_tool_calls", neutral=(True,)),
    **_refused("use 'thinking'", "enable_thinking"),
    **_refused("use 'system'", "system_prompt", "instructions"),
    **_refused("no tool is run here", "container", "mcp_servers"),
    **_refused("it is not offered", "include"),
    **_ignored("a prompt that does not fit is refused, never cut", "context_management"),
    **_ignored("the prefix cache is one, and always used", "cache_control"),
    **_ignored("there is one place and one speed", "inference_geo", "speed"),
    **_ignored("it is sent to Anthropic's own servers", "anthropic_version", "anthropic_beta", "betas"),
    **_ignored("it says who asks, and the answer does not depend on it", "user_profile_id", "workspace_id"),
    **_ignored("nothing is stored", "diagnostics"),
}
"""For /v1/messages."""

STRUCTURED: Treatments = {
    **_ignored("one library compiles all schemas", "backend", "_backend", "_backend_was_auto"),
    **_ignored("JSON is written in one style", "disable_any_whitespace"),
    **_ignored("one library compiles all schemas", "disable_fallback"),
    **_refused("a schema says it itself", "disable_additional_properties"),
    **_refused("use 'json', 'regex' or 'grammar'", "structural_tag"),
}
"""For vLLM's `structured_outputs`."""

MESSAGE: Treatments = {
    **_ignored("it is not shown to models", "id", "status", "index", "annotations", "phase", "cache_control"),
    **_ignored("it is not shown to models", "thinking_blocks", "provider_specific_fields", "citations"),
    **_ignored("text is all that is taken in", "audio"),
    **_refused("the assistant always begins a new turn", "prefix"),
}

ITEM: Treatments = {
    **MESSAGE,
    **_ignored("it is not shown to models", "namespace", "caller", "internal"),
    **_ignored("nobody but its author can read it", "encrypted_content"),
}
"""Within `input` of /v1/responses."""

REASONING: Treatments = {
    **_ignored("thoughts are shown whole", "summary", "generate_summary"),
    **_ignored("thoughts go back to the model as items of the input", "context", "mode"),
}

PART: Treatments = {
    **MESSAGE,
    **_ignored("the part's type says that it is refused", "image_url", "input_audio", "file", "video_url"),
    **_ignored(
        "the part's type says that it is refused", "audio_url", "image", "file_id", "file_data", "detail"
    ),
    **_ignored("it is not shown to models", "logprobs", "signature", "data", "summary", "content"),
}

FORM: Treatments = {
    **_ignored("it is not shown to models", "description", "name"),
    **_refused("use type json_schema", "structures", "triggers"),
    **_refused("it stands beside the schema, in 'json_schema'", "strict"),
    **_refused("the model decides how long it answers", "verbosity", neutral=("medium",)),
}
"""Within `response_format`, and `text` of /v1/responses."""

TOOL: Treatments = {
    **_ignored("arguments follow the schema where a call is forced", "strict"),
    **_ignored("it is not shown to models", "cache_control"),
}

BLOCK: Treatments = {
    **_ignored("the prefix cache is one, and always used", "cache_control"),
    **_ignored("it is not shown to models", "citations", "signature", "data", "caller", "toolset_name"),
    **_ignored("the block's type says that it is refused", "source", "title", "context", "file_id"),
    **_ignored("a result says itself that it is an error", "is_error"),
}
"""Within the messages of /v1/messages."""

ANTHROPIC_TOOL: Treatments = {
    **TOOL,
    **_ignored("all tools are shown to the model, as JSON schemas", "defer_loading", "input_examples"),
    **_ignored("it is for tools that Anthropic runs", "allowed_callers"),
    **_ignored("arguments are streamed as they come", "eager_input_streaming"),
}

THINKING: Treatments = {**_ignored("the model decides how long it thinks", "budget_tokens")}

STREAM: Treatments = {
    **_ignored("texts have their own length", "include_obfuscation"),
    **_refused("usage comes once, at the end", "continuous_usage_stats"),
}

TOKENIZE: Treatments = {
    **_TEMPLATE,
    **_refused("use 'prompt'", "content", "text", "input", "inputs"),
    **_refused("use 'add_special_tokens'", "add_special", neutral=()),
    **_refused("special tokens of a text are always found", "parse_special", neutral=(True,)),
    **_refused("use 'return_token_strs'", "with_pieces"),
    **{name: _LENGTH[name] for name in ("truncate_prompt_tokens", "truncate")},
}
"""For /tokenize: what changes the tokens of a prompt. Others are llama.cpp's and TGI's."""

PLAIN: Treatments = {**_ignored("there is one model", "model")}
"""For routes that do not generate."""
