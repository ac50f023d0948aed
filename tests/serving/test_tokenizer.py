"""Texts of any size to token ids: what fits is exact, and what cannot fit costs little."""

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.tokenizer import COUNTED_TOKENS, PromptTokenizer
from tests.costs import plain_pass_s

pytestmark = pytest.mark.anyio

FOUR_MB = {
    "words": "a b " * 1_000_000,
    "one word": "ab" * 2_000_000,
    "spaces": " " * 4_000_000,
    "U+FDFA": "\ufdfa" * 1_300_000,
    "combining marks": "a" + "\u0301" * 2_000_000,
    "special tokens": "<|im_end|>" * 400_000,
    "lines": "\n" * 4_000_000,
}


BEYOND_CONTEXT = (
    r"maximum context length is 32768 tokens\. However, your messages resulted in at least \d+ tokens"
)


def sentencepiece_like() -> Any:
    """A tokenizer without pre-tokenizer and with byte fallback, as Llama 2's: a text is one word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256)), "ab", "▁a", "abab", "▁▁", "▁▁▁▁"]
    merges = [("a", "b"), ("▁", "a"), ("ab", "ab"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocabulary = {token: number for number, token in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(params=["byte-level", "sentencepiece"])
def prompts(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[PromptTokenizer]:
    """A context that holds less than 4 MB."""
    used = copy.deepcopy(tokenizer) if request.param == "byte-level" else sentencepiece_like()
    used.add_tokens(
        ["=" * 128]
    )  # as long as the longest of real vocabularies: the length alone refuses little
    made = PromptTokenizer(
        used,
        context_tokens=32_768,
        new_tokens=16,
        stop_ids=frozenset(),
        defaults=SamplingDefaults(),
    )
    yield made
    made.close()


@pytest.mark.parametrize("name", FOUR_MB)
async def test_four_megabytes_are_refused_for_little(prompts: PromptTokenizer, name: str) -> None:
    """Each is refused after the part that is too long already: 4 times a plain pass at most."""
    plain = plain_pass_s()
    for tokenize, message, code in (
        (prompts.prompt_from_text, BEYOND_CONTEXT, "context_length_exceeded"),
        (prompts.tokenize_text, r"'prompt' has \d+ tokens or more; at most 65536", None),
    ):
        started = time.process_time()
        with pytest.raises(RequestError, match=message) as refused:
            await tokenize(FOUR_MB[name])
        assert time.process_time() - started < 25 * plain
        assert refused.value.code == code


async def test_what_fits_is_tokenized_whole(prompts: PromptTokenizer) -> None:
    for text in ("ab ba " * 5000, "\ufdfa" * 2000, "abab" * 7000):
        assert await prompts.tokenize_text(text) == prompts._tokenizer.encode(text)
        assert len(await prompts.prompt_from_text(text)) < 32_768


async def test_a_text_that_fits_is_taken_however_many_characters_it_has(tokenizer: Any) -> None:
    """Long tokens: more than twice as many characters as the context has tokens, counted in pieces."""
    prompts = PromptTokenizer(
        tokenizer, context_tokens=12_000, new_tokens=16, stop_ids=frozenset(), defaults=SamplingDefaults()
    )
    try:
        text = "<|im_end|>" * 11_999
        assert len(await prompts.prompt_from_text(text)) == 11_999
        with pytest.raises(RequestError):
            await prompts.prompt_from_text(text + "<|im_end|>" * 2)
    finally:
        prompts.close()


async def test_a_length_that_cannot_fit_is_refused_without_tokenizing(prompts: PromptTokenizer) -> None:
    prompts.check_length("a" * 32_768, "prompt")
    with pytest.raises(RequestError) as refused:
        prompts.check_length("a" * 4_300_000, "input")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")


async def test_a_long_conversation_is_refused_for_little(tokenizer: Any) -> None:
    prompts = PromptTokenizer(
        tokenizer, context_tokens=32_768, new_tokens=16, stop_ids=frozenset(), defaults=SamplingDefaults()
    )
    try:
        plain, started = plain_pass_s(), time.process_time()
        with pytest.raises(RequestError, match=BEYOND_CONTEXT) as refused:
            await prompts.prompt_from_chat([{"role": "user", "content": "ab" * 2_000_000}])
        assert time.process_time() - started < 25 * plain
        assert refused.value.param == "messages"
    finally:
        prompts.close()


async def test_ids_to_text_and_texts_of_ids_have_the_same_bound(prompts: PromptTokenizer) -> None:
    ids = await prompts.tokenize_text("abab ba")
    assert await prompts.token_texts(ids) == [prompts.token_text(token) for token in ids]
    assert await prompts.detokenize(ids) == prompts.decode_verbatim(ids)
    plain, started = plain_pass_s(), time.process_time()
    with pytest.raises(RequestError, match=f"at most {COUNTED_TOKENS}"):
        await prompts.detokenize([1] * 1_900_000)
    assert time.process_time() - started < plain
