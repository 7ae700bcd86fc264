"""The table of commands, and how a run of one ends."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from ..version import __version__
from . import bench, cache, compile, doctor, explain
from .mistakes import explain_mistake

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain text: it keeps the lines of the examples, and reads the same everywhere
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Lists and clears the store of modules, kernels and schedules.", rich_markup_mode=None)


def _example(*lines: str) -> str:
    """The end of a help text; the first character tells the formatter to keep the lines."""
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])


for _module, _command in (
    (bench, bench.bench),
    (explain, explain.explain),
    (doctor, doctor.doctor),
    (compile, compile.compile_kernels),
):
    app.command(_module.__name__.rpartition(".")[2], epilog=_example(*_module.EXAMPLES))(_command)
for _name, _action in cache.COMMANDS.items():
    cache_app.command(_name, epilog=_example(f"flexdecode cache {_name}"))(_action)
app.add_typer(cache_app, name="cache", epilog=_example("flexdecode cache list"))


@app.callback(invoke_without_command=True, epilog=_example("flexdecode doctor", explain.EXAMPLES[0]))
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Decode attention from two Python functions: measure it, explain it, compile it."""
    if version:
        typer.echo(f"flexdecode {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str] | None) -> int:
    """Runs a command line, and says what is wrong with it in place of a traceback.

    Returns:
        The exit status: that of the command, or 2 for a user's mistake.
    """
    command: Any = typer.main.get_command(app)
    with warnings.catch_warnings():
        # `catch_warnings` puts the function back. Ours ignores what it does not show, so its type is wider.
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            return command.main(args=arguments, prog_name="flexdecode", standalone_mode=False) or 0
        except Exception as error:  # what is no mistake of the user's is raised again
            if isinstance(error.__cause__, KeyboardInterrupt):  # older versions of typer say it in this way
                raise error.__cause__ from None
            text = explain_mistake(error)
            if text is None:
                raise
            print(f"flexdecode: {text}", file=sys.stderr)
            return 2


def _show_warning(message: Warning | str, *_: object) -> None:
    """Shows a warning without the line of code that gave it, which is not the user's."""
    print(f"flexdecode: warning: {message}", file=sys.stderr)
