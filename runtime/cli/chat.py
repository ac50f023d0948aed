"""`runtime chat`: a conversation in the terminal with a running server.

Knows flags, the key's variable and the terminal; the conversation lies in serving/terminal.py.
Start at `chat`.
"""

import sys
from typing import Annotated

import typer

from runtime import ports
from runtime.cli.options import Debug, KeyFrom, api_key, port_variable

READ_TIMEOUT_S = 600.0
"""Longest silence of the server before the request fails; it sends a comment every few seconds."""

Url = Annotated[
    str | None,
    typer.Argument(
        metavar="URL",
        help=f"The server; by default this machine, port {ports.SERVING} or that of the variable PORT.",
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="The base model or an adapter.")]
System = Annotated[str, typer.Option(help="System prompt of the conversation.")]


def chat(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    url: Url = None,
    model: Model = None,
    system: System = "",
    api_key_env: KeyFrom = None,
    debug: Debug = False,
) -> None:
    """Talk to a server: type a question, Ctrl-C stops an answer, Ctrl-D ends. A pipe asks line by line."""
    import httpx

    from runtime.serving.terminal import connect, talk

    key = api_key(context.obj, api_key_env)
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    address = url or f"http://127.0.0.1:{port_variable(context.obj) or ports.SERVING}"
    if "://" not in address:
        address = f"http://{address}"
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - input() then has line editing and history

    timeout = httpx.Timeout(10.0, read=READ_TIMEOUT_S)
    with httpx.Client(base_url=address, headers=headers, timeout=timeout) as client:
        conversation = connect(client, model)
        conversation.system = system
        talk(
            conversation,
            read=lambda: input("> " if typed else ""),
            write=lambda text: typer.echo(text, nl=False),
            greet=typed,
        )
