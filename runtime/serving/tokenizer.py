"""From conversations and texts to token ids, and back to text.

The only part of serving that knows the tokenizer, with chat_template.py. Does not know HTTP or the engine's
state. Start at `PromptTokenizer.prompt_from_chat`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import RequestError
from runtime.serving import chat_template
from runtime.serving.chat_template import TemplateOptions, Turn
from runtime.serving.engine.protocol import Constraint, Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.structured_output.compiler import GrammarCompiler
from runtime.serving.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class PromptTokenizer:
    """One model's tokenizer, with the limits and defaults of the requests to it."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_tokens: int,
        new_tokens: int,
        stop_ids: frozenset[int],
        defaults: SamplingDefaults,
    ) -> None:
        self.context_tokens = context_tokens
        self.default_new_tokens = new_tokens
        self.stop_ids = stop_ids
        self.defaults = defaults
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {str(token): number for number, token in added.items() if token.special}
        """The special tokens, which `decode` leaves out, with their ids."""
        self.token_bytes = TokenBytes(tokenizer)
        self._grammars = GrammarCompiler(tokenizer, stop_ids)
        # One thread: long prompts do not block the event loop, and the tokenizer is never entered twice.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def start(self) -> None:
        """Read the vocabulary for constraints in the background."""
        self._grammars.start()

    def close(self) -> None:
        """Let the tokenizer's thread and the processes of constraints end."""
        self._grammars.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def warm_up_prompt(self) -> tuple[int, ...]:
        """Return a short prompt, for a first generation that proves the engine works."""
        return self.prompt_from_ids(self._tokenizer.encode("Hello"))

    @property
    def template(self) -> str:
        """The chat template, "" when the model has none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else ""

    async def prompt_from_chat(
        self,
        turns: Sequence[Turn],
        *,
        options: TemplateOptions | None = None,
        param: str = "messages",
    ) -> tuple[int, ...]:
        """Return the token ids of a conversation, up to where the assistant begins to speak.

        Raises RequestError: no template, a role or order it refuses, or too many tokens.
        """
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or /chat with 'prompt'",
                param=param,
            )
        return self._checked(await self.tokenize_chat(turns, options=options), param)

    async def prompt_from_text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return the token ids of `text` as it stands; `special` adds the tokenizer's opening tokens."""
        return self._checked(await self.tokenize_text(text, special=special), "prompt")

    def prompt_from_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return token ids that a client sent, checked against vocabulary and context."""
        self.check_ids(ids, "prompt")
        return self._checked(ids, "prompt")

    async def tokenize_chat(
        self, turns: Sequence[Turn], *, options: TemplateOptions | None = None
    ) -> list[int]:
        """Return the token ids of a conversation, of any length."""
        return await self._in_thread(lambda: self._render(turns, options or TemplateOptions()))

    async def tokenize_text(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`, of any length; `special` adds the tokenizer's opening tokens."""
        return await self._in_thread(lambda: self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_verbatim(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` with special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def token_text(self, token: int) -> str:
        """Return one token as text, special tokens too; U+FFFD where it is part of a character."""
        return str(self._tokenizer.decode([token]))

    def check_template_variables(self, variables: Mapping[str, Any], param: str) -> None:
        """Raise RequestError, naming the field `param`, for variables that a request may not set."""
        chat_template.check_variables(self._tokenizer, variables, param)

    async def spellings(self, words: Sequence[str]) -> list[list[int]]:
        """Return how `words` are spelled in tokens, at the beginning of a text and after a space."""
        return await self._in_thread(lambda: [ids for word in words for ids in self._spellings(word)])

    def _spellings(self, word: str) -> list[list[int]]:
        texts = (word.lstrip(), " " + word.lstrip())
        first, spaced = (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)
        if not first:
            return []
        # a space that is a token of its own leaves the word as it is spelled without one
        return [first] if spaced[-len(first) :] == first else [first, spaced]

    def special_within(self, texts: Sequence[str]) -> dict[str, int]:
        """Return the special tokens that occur in `texts`, with their ids."""
        if not texts:
            return {}
        return {text: number for text, number in self.special.items() if any(text in each for each in texts)}

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """Return the ids of those `texts` that are special tokens."""
        return [self.special[text] for text in texts if text in self.special]

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise RequestError, naming the field `param`, when an id is not in the vocabulary."""
        unknown = next((i for i in ids if i >= self._vocabulary), None)
        if unknown is not None:
            raise RequestError(
                f"token id {unknown} is not in the vocabulary of {self._vocabulary}", param=param
            )

    async def constrained(
        self, sampling: Sampling, constraint: Constraint | None, *, client: str = ""
    ) -> Sampling:
        """Return `sampling` with the constraint's grammar; the answer then ends where that is complete.

        `client` is who waits for it; clients take turns.
        """
        if constraint is None:
            return sampling
        grammar = await self._grammars.compile(constraint, client)
        return replace(
            sampling, grammar=grammar, min_new_tokens=0, stop_ids=sampling.stop_ids | self.stop_ids
        )

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        if not ids:
            raise RequestError("the prompt has no tokens; send some text", param=param)
        if len(ids) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; prompt and answer together may have "
                f"{self.context_tokens}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return tuple(ids)

    def _render(self, turns: Sequence[Turn], options: TemplateOptions) -> list[int]:
        text = chat_template.render(self._tokenizer, turns, options)
        return list(self._tokenizer.encode(text, add_special_tokens=options.adds_special))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
