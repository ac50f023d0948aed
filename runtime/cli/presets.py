"""`runtime presets`: the models known by name, as a table or as JSON, or all facts about one.

Knows how a preset is printed; runtime/presets.py finds them. Start at `presets`.
"""

import json
from typing import Annotated, Any

import typer

from runtime import families, support
from runtime.cli import render
from runtime.cli.options import AsJson, Debug
from runtime.config import flatten
from runtime.presets import Preset, all_presets, find

Name = Annotated[str | None, typer.Argument(metavar="NAME", help="Show all facts about this preset.")]


def presets(name: Name = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the models known by name; of one, also why it is not batched or not tuned."""
    if name is not None:
        facts = _facts(find(name))
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        else:
            render.table(
                ("fact", "value"),
                [(key, render.cell(value, whole=True)) for key, value in flatten(facts).items()],
            )
    elif as_json:
        typer.echo(json.dumps([_facts(preset) for preset in all_presets()], indent=2))
    else:
        render.table(
            ("name", "parameters", "context", "download", "licence", "gated", "serve", "tune", "repository"),
            [_row(preset) for preset in all_presets()],
        )


def _facts(preset: Preset) -> dict[str, Any]:
    facts = preset.model_dump(mode="json")
    renames = families.find(preset.model_type).renames
    served, why = support.serving_of(preset)
    return {
        **facts,
        "fused_targets": renames,
        "parameters": preset.parameters,
        "served": served,
        "not_batched": why or None,
        "tunable": preset.tunable,
    }


def _row(preset: Preset) -> tuple[str, ...]:
    return (
        preset.name,
        render.parameter_count(preset.parameters),
        str(preset.context_tokens),
        f"{preset.download_gib:.1f} GiB",
        preset.licence,
        "yes" if preset.gated else "no",
        support.serving_of(preset)[0],
        "yes" if preset.tunable else "no",
        preset.repository,
    )
