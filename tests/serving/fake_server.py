"""Runs the real server over the engine without a model: `python -m tests.serving.fake_server JSON`."""

import json
import os
import sys
import time
from functools import partial
from typing import Any

from runtime import errors, logs
from runtime.model_source import ModelSource
from runtime.serving.engine.protocol import Request
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http import server
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import ServeConfig
from runtime.serving.tokenizer import PromptTokenizer
from tests.serving.conftest import make_tokenizer
from tests.serving.echo_engine import EchoEngine

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


def main(options: dict[str, Any]) -> None:
    """Serve as `options` say: config, engine, load_s (how long loading takes), fail (what it ends with),
    close_s (how long the engine takes to close), says (it answers with what follows "SAY:"), answers (by
    a part of the question), templates (of adapters), files_left (all other file descriptors are used up)."""
    logs.configure()

    def load(config: ServeConfig) -> ServedModel:
        time.sleep(options.get("load_s", 0))
        if "fail" in options:
            raise errors.CapacityError(options["fail"])
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TOOLS + tokenizer.chat_template
        answers = options.get("answers", {})
        script = partial(said, tokenizer, answers) if options.get("says") or answers else None
        engine = EchoEngine(**options.get("engine", {}), close_s=options.get("close_s", 0), script=script)
        prompts = PromptTokenizer(
            tokenizer,
            context_tokens=engine.context_tokens,
            new_tokens=config.limits.new_tokens,
            stop_ids=frozenset({tokenizer.eos_token_id}),
            defaults=SamplingDefaults(),
        )
        use_up_files(options.get("files_left"))
        templates = options.get("templates", {})
        own = {name: prompts.with_template(template) for name, template in templates.items()}
        return ServedModel(
            name=config.served_name,
            engine=engine,
            tokenizer=prompts,
            created=1,
            adapter_tokenizers=own,
            reasoning_parser=config.reasoning_parser,
        )

    settings = {"model": ModelSource(name="echo"), "served_name": "base", "host": "127.0.0.1", "port": 0}
    config = ServeConfig.model_validate(settings | options.get("config", {}))
    try:
        server.run(config, load=load)
    except errors.Failure as failure:
        sys.stderr.write(f"Error: {failure}\n")
        raise SystemExit(errors.exit_code(failure)) from None


def said(tokenizer: Any, answers: dict[str, str], request: Request) -> list[int]:
    """Return the tokens of the answer to the prompt's last message, or of what follows "SAY:" in it."""
    prompt = tokenizer.decode(list(request.prompt_ids))
    question = prompt.removesuffix("<|im_start|>assistant\n").rpartition("<|im_start|>")[2]
    known = (answer for part, answer in answers.items() if part in question)
    text = next(known, prompt.rpartition("SAY:")[2].partition("<|im_end|>")[0])
    return list(tokenizer.encode(text))


def use_up_files(left: int | None) -> None:
    """Open files until only `left` more could be opened; None opens none."""
    opened: list[int] = []
    try:
        while left is not None:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for file in opened[len(opened) - (left or 0) :]:
            os.close(file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
