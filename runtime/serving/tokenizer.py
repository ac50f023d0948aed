"""From conversations and texts to token ids, and back to text.

The only part of serving that knows the tokenizer, with template_requests.py. Does not know HTTP or the
engine's state. Start at `PromptTokenizer.prompt_from_chat`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime import chat_template
from runtime.chat_template import TemplateFeatures, TemplateOptions, Turn
from runtime.errors import ClientGoneError, ContextLengthError, RequestError, TemplateLongError
from runtime.serving import template_requests
from runtime.serving.answer_parsers.choosing import chosen
from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.engine.protocol import Constraint, Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.structured_output.compiler import GrammarCompiler
from runtime.serving.token_bytes import TokenBytes
from runtime.serving.tokenizing import CALLER, SHORT_CHARACTERS, Stopped, TokenizingPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_TOKENS = 16
"""Tokens at the end of a prompt that may open a thought or a message of the answer."""
COUNTED_TOKENS = 65_536
"""Tokens of a text that /tokenize counts, where the context is no longer."""
PIECE_CHARACTERS = 32_768
"""A text that hardly fits is counted in such pieces first, until it is known that it does not fit."""
CUT_TOKENS = 16
"""By how many tokens a cut between two pieces changes their number, at the most."""


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
        self._features = _features_of(tokenizer)
        """By whether there are tools and documents."""
        self._vocabulary = len(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {str(token): number for number, token in added.items() if token.special}
        """The special tokens, which `decode` leaves out, with their ids."""
        self.token_bytes = TokenBytes(tokenizer)
        self._grammars = GrammarCompiler(tokenizer, stop_ids)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._texts: dict[int, str] = {}
        self._forms: dict[tuple[str | None, str | None], AnswerForm] = {}
        self._pool = TokenizingPool()

    def start(self) -> None:
        """Read the vocabulary for constraints in the background."""
        self._grammars.start()

    def close(self) -> None:
        """Let the tokenizer's threads and the processes of constraints end."""
        self._grammars.close()
        self._pool.close()

    def warm_up_prompt(self) -> tuple[int, ...]:
        """Return a short prompt, for a first generation that proves the engine works."""
        return self.prompt_from_ids(self._tokenizer.encode("Hello"))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._tokenizer.chat_template)

    def features(self, *, with_tools: bool = False, with_documents: bool = False) -> TemplateFeatures:
        """Return what the chat template renders that a conversation of this kind gets."""
        return self._features[with_tools, with_documents]

    def features_for(self, options: TemplateOptions) -> TemplateFeatures:
        """Return what the chat template renders that a conversation with these options gets."""
        return self._features[bool(options.tools), bool(options.documents)]

    def answer_form(self, *, reasoning: str | None = None, calls: str | None = None) -> AnswerForm:
        """Return how this model's answers are read: as it is told by names, else as its template writes."""
        names = (reasoning, calls)
        if names not in self._forms:
            tokens = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}
            features = self.features(with_tools=True)
            self._forms[names] = chosen(features, tokens, reasoning=reasoning, calls=calls)
        return self._forms[names]

    def with_template(self, template: str | dict[str, str]) -> "PromptTokenizer":
        """Return this tokenizer with another chat template; all else, threads too, is shared.

        ConfigError for one that cannot be used.
        """
        other = copy.copy(self)
        other._tokenizer = copy.copy(self._tokenizer)
        other._tokenizer.chat_template = template
        other._forms = {}
        other._features = _features_of(other._tokenizer)
        return other

    def has_template(self, template: str | dict[str, str]) -> bool:
        """Whether `template` is the chat template here."""
        return bool(self._tokenizer.chat_template == template)

    def same_template(self, other: "PromptTokenizer") -> bool:
        """Whether `other` has the chat template of this one."""
        return bool(self._tokenizer.chat_template == other._tokenizer.chat_template)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The tokens with their ids."""
        return dict(self._tokenizer.get_vocab())

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
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or /chat with 'prompt'",
                param=param,
            )
        most = self.context_tokens
        return self._checked(await self._chat_ids(turns, options or TemplateOptions(), most, param), param)

    async def prompt_from_text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return the token ids of `text` as it stands; `special` adds the tokenizer's opening tokens."""
        return self._checked(await self._text_ids(text, self.context_tokens, special=special), "prompt")

    def prompt_from_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return token ids that a client sent, checked against vocabulary and context."""
        self.check_ids(ids, "prompt")
        return self._checked(ids, "prompt")

    async def tokenize_chat(
        self, turns: Sequence[Turn], *, options: TemplateOptions | None = None
    ) -> list[int]:
        """Return the token ids of a conversation; RequestError beyond `counted_tokens`."""
        return await self._chat_ids(turns, options or TemplateOptions(), self.counted_tokens, "messages")

    async def tokenize_text(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`, with the tokenizer's opening tokens if `special`.

        Raises RequestError beyond `counted_tokens`.
        """
        return await self._text_ids(text, self.counted_tokens, special=special)

    @property
    def counted_tokens(self) -> int:
        """Tokens that a text or a list of ids may have where nothing is generated from it."""
        return max(self.context_tokens, COUNTED_TOKENS)

    def check_length(self, text: str, param: str) -> None:
        """Raise RequestError for a text that cannot fit into the context, without tokenizing it."""
        self._check_length(text, self.context_tokens, param)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` with special tokens; RequestError for unknown ids or too many."""
        self._check_count(len(ids), self.counted_tokens, "tokens")
        self.check_ids(ids, "tokens")
        return await self._pool.run(lambda stopped: self.decode_verbatim(ids), characters=4 * len(ids))

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each of `ids`, as `token_text` does."""

        def texts(stopped: Stopped) -> list[str]:
            for token in set(ids) - self._texts.keys():
                if stopped():
                    return []
                self._texts[token] = self.token_text(token)
            return [self._texts[token] for token in ids]

        return await self._pool.run(texts, characters=4 * len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_verbatim(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` with special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def end_of(self, prompt: Sequence[int]) -> str:
        """Return the text of a prompt's last tokens with special tokens: it may open a thought."""
        return self.decode_verbatim(prompt[-END_TOKENS:])

    def token_text(self, token: int) -> str:
        """Return one token as text, special tokens too; U+FFFD where it is part of a character."""
        return str(self._tokenizer.decode([token]))

    def check_template_variables(self, variables: Mapping[str, Any], param: str) -> None:
        """Raise RequestError, naming the field `param`, for variables that a request may not set."""
        template_requests.check_variables(self._tokenizer, variables, param)

    async def spellings(self, words: Sequence[str]) -> list[list[int]]:
        """Return how `words` are spelled in tokens, at the beginning of a text and after a space."""

        def spelled(stopped: Stopped) -> list[list[int]]:
            return [ids for word in words for ids in self._spellings(word)]

        return await self._pool.run(spelled, characters=sum(map(len, words)))

    def _spellings(self, word: str) -> list[list[int]]:
        texts = (word.lstrip(), " " + word.lstrip())
        first, spaced = (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)
        if not first:
            return []
        # a space that is a token of its own leaves the word as it is spelled without one
        return [first] if spaced[-len(first) :] == first else [first, spaced]

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

    async def constrained(self, sampling: Sampling, constraint: Constraint | None) -> Sampling:
        """Return `sampling` with the constraint's grammar; the answer then ends where that is complete.

        Clients take turns with it, as in tokenizing.
        """
        if constraint is None:
            return sampling
        grammar = await self._grammars.compile(constraint, CALLER.get().name)
        return replace(
            sampling, grammar=grammar, min_new_tokens=0, stop_ids=sampling.stop_ids | self.stop_ids
        )

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        if not ids:
            raise RequestError("the prompt has no tokens; send some text", param=param)
        if len(ids) >= self.context_tokens:
            raise ContextLengthError(self.context_tokens, len(ids), param=param)
        return tuple(ids)

    async def _chat_ids(
        self, turns: Sequence[Turn], options: TemplateOptions, most: int, param: str
    ) -> list[int]:
        options = replace(options, most_characters=most * self._longest_token)

        def ids(stopped: Stopped) -> list[int]:
            try:
                text = template_requests.render(self._tokenizer, turns, options)
            except TemplateLongError:
                self._check_count(most + 1, most, param)
                raise
            self._check_tokens(text, most, param, stopped)
            return list(self._tokenizer.encode(text, add_special_tokens=options.adds_special))

        return await self._pool.run(
            ids,
            characters=_characters(turns, options.tools, options.documents),
            apart=chat_template.is_slow(self._tokenizer, options),
        )

    async def _text_ids(self, text: str, most: int, *, special: bool) -> list[int]:
        def ids(stopped: Stopped) -> list[int]:
            self._check_tokens(text, most, "prompt", stopped)
            return list(self._tokenizer.encode(text, add_special_tokens=special))

        self._check_length(text, most, "prompt")
        return await self._pool.run(ids, characters=len(text))

    def _check_tokens(self, text: str, most: int, param: str, stopped: Stopped) -> None:
        """Raise RequestError as soon as it is known that `text` has more than `most` tokens."""
        self._check_length(text, most, param)
        if len(text) <= 2 * most:
            return
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            if stopped():
                raise ClientGoneError("the client closed the connection")
            piece = text[start : start + PIECE_CHARACTERS]
            count += len(self._tokenizer.encode(piece, add_special_tokens=False)) - CUT_TOKENS
            self._check_count(count, most, param)

    def _check_length(self, text: str, most: int, param: str) -> None:
        self._check_count(len(text) // self._longest_token, most, param)

    def _check_count(self, least: int, most: int, param: str) -> None:
        """Raise RequestError for a text or list of at least `least` tokens where `most` are possible."""
        if least <= most:
            return
        if most == self.context_tokens:
            raise ContextLengthError(most, least, param=param, or_more=True)
        raise RequestError(
            f"'{param}' has {least} tokens or more; at most {most} are taken here", param=param
        )


def _features_of(tokenizer: "PreTrainedTokenizerBase") -> dict[tuple[bool, bool], TemplateFeatures]:
    """Return what the chat templates render, by whether there are tools and documents."""
    kinds = ((tools, documents) for tools in (False, True) for documents in (False, True))
    return {
        (tools, documents): chat_template.features(tokenizer, with_tools=tools, with_documents=documents)
        for tools, documents in kinds
    }


def _characters(*values: Any) -> int:
    """Return about how many characters of text are in `values`, or that they are more than a short text's."""
    count, waiting = 0, list(values)
    while waiting and count <= SHORT_CHARACTERS:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        count += len(value) if isinstance(value, str) else 8
    return count
