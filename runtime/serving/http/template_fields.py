"""The fields of a request that say how its conversation is rendered, and what they mean.

Knows what the model's template reads; does not know how it is rendered. Start at `template_options`.
"""

from typing import Annotated, Any

from pydantic import Field

from runtime.chat_template import TemplateFeatures, TemplateOptions
from runtime.errors import RequestError
from runtime.serving.http.body_types import Body, Flag, Name
from runtime.serving.tokenizer import PromptTokenizer

MAX_DOCUMENTS = 128


class TemplateFields(Body):
    """How the conversation becomes the prompt."""

    add_generation_prompt: Flag | None = None
    """End the prompt where the assistant begins to speak; true, unless `continue_final_message`."""
    continue_final_message: Flag = False
    """The answer continues the text of the last message."""
    add_special_tokens: Flag | None = None
    """Put the tokenizer's opening tokens before what the template writes; false by default."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's chat template."""
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    """Texts for a template that shows them to the model."""
    reasoning_effort: Name | None = None
    """A variable for the model's chat template; one that turns thinking on or off takes "none" as off."""


def template_options(
    body: TemplateFields, tokenizer: PromptTokenizer, tools: list[dict[str, Any]] | None
) -> TemplateOptions:
    """Return how to render the conversation of `body`.

    Raises RequestError for documents that the template does not read, fields that exclude each other, and
    variables that stand for something else.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other",
            param="add_generation_prompt",
        )
    features = tokenizer.features_for(TemplateOptions(tools=tools, documents=body.documents))
    if body.documents and not features.documents:
        raise RequestError("this model's chat template knows no documents", param="documents")
    variables = dict(body.chat_template_kwargs or {})
    tokenizer.check_template_variables(variables, "chat_template_kwargs")
    if body.reasoning_effort is not None and tokenizer.has_chat_template:
        variables = _effort(body.reasoning_effort, features) | variables
    return TemplateOptions(
        tools=tools,
        documents=body.documents or None,
        variables=variables,
        begins_answer=body.add_generation_prompt is not False,
        continues_last=body.continue_final_message,
        adds_special=bool(body.add_special_tokens),
    )


def _effort(effort: str, features: TemplateFeatures) -> dict[str, Any]:
    """Return the variables that stand for an effort of reasoning; {} where the template reads none."""
    if features.effort:
        return {"reasoning_effort": effort}
    return {features.thinking: effort != "none"} if features.thinking else {}
