"""The console script `runtime`: its commands, and how every failure becomes one line and an exit status.

Reads the environment and the arguments of the process. What a command does lies elsewhere and is imported
when it runs, so that help and dry runs answer at once. Start at `main`.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from runtime import __version__, garbage_collection, logs
from runtime.cli import chat, images, manifest, merge, plan, presets, serve, tune
from runtime.errors import ConfigError, Failure, StoppedError, exit_code
from runtime.files import disk_failure
from runtime.redaction import redact

log = logging.getLogger(__name__)

app = typer.Typer(
    name="runtime",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("tune")(tune.tune)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("manifest")(manifest.manifest)
app.command("plan")(plan.plan)
app.command("merge")(merge.merge)
app.command("presets")(presets.presets)
images.add_to(app)


USAGE_ERROR: Any = typer.BadParameter.__base__
"""The class of all mistakes in flags, for which typer has no public name."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
]


@app.callback()
def options(version: Version = False) -> None:
    """Tune and serve language models: for a Kubernetes Workspace, docker run, or this machine."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line of this process and exit with its status."""
    signal.signal(signal.SIGTERM, _stop)  # tune and serve have handlers of their own
    garbage_collection.exit_without(run(sys.argv[1:], os.environ))


def _stop(number: int, _: FrameType | None) -> None:
    """Leave as after any failure, so that nothing half-written stays; a second signal ends the process."""
    signal.signal(number, signal.SIG_DFL)
    raise StoppedError(f"stopped by {signal.Signals(number).name}; the same command starts again")


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command and return its exit status; every Exception becomes one line."""
    debug = "--debug" in arguments or environ.get("DEBUG_MODE", "").lower() in ("true", "1")
    logs.configure(debug=debug)
    try:
        status = app(list(arguments), prog_name="runtime", obj=environ, standalone_mode=False)
    except USAGE_ERROR as error:
        return _explain_usage(error)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Failure as failure:
        return _explain(failure, str(failure), exit_code(failure), debug=debug)
    except PermissionError as error:
        denied = ConfigError(_denied(error))
        return _explain(error, str(denied), exit_code(denied), debug=debug)
    except OSError as error:
        named = disk_failure(error)
        if named is None:
            return _explain_bug(error, debug=debug)
        return _explain(error, str(named), exit_code(named), debug=debug)
    except Exception as error:
        return _explain_bug(error, debug=debug)
    return status if isinstance(status, int) else 0


def _explain_usage(error: Any) -> int:
    """Write what is wrong with the flags, in the form of every other mistake; help where none are given."""
    message = str(error.format_message())
    if message.startswith("Usage:"):
        typer.echo(message, err=True)
        return int(error.exit_code)
    command = error.ctx.command_path if error.ctx else "runtime"
    extra = re.fullmatch(r"Got unexpected extra argument(?:s|\(s\))? \((\S+)\)\.?", message)
    if extra and command == "runtime tune":
        message = f"{extra[1]}: the model or manifest is given already; give it as --data {extra[1]}"
    return _explain(
        error, f"{message.rstrip('.')}; see `{command} --help`", int(error.exit_code), debug=False
    )


def _explain_bug(error: Exception, *, debug: bool) -> int:
    hint = "" if debug else "; rerun with --debug for the traceback"
    return _explain(error, f"internal error: {type(error).__name__}: {error}{hint}", 1, debug=debug)


def _denied(error: PermissionError) -> str:
    """Return what to do about a file that this process may not use; in a container, usually a mount."""
    whom = f"user {os.geteuid()} with group {os.getegid()}"
    remedy = "open it and the folders above it, or run as its owner"
    return f"{error.filename}: permission denied for {whom}; {remedy}"


def _explain(error: BaseException, message: str, status: int, *, debug: bool) -> int:
    """Write the one line, with --debug after the traceback, and return `status`."""
    if debug:
        log.debug("traceback", exc_info=error)
    typer.echo(f"error: {logs.printable(redact(' '.join(message.split())))}", err=True)
    return status
