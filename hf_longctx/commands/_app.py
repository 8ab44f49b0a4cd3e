"""``hf-longctx``: the group of all commands, which are the files of this folder.

A file ``commands/<word>.py`` is the command ``<word>`` (``-`` for ``_``). It exports ``command``, a function, or
``app``, a Typer group; beside ``command`` it may export ``SETTINGS``, further arguments of ``typer.Typer.command``.
With ``MANY_PROCESSES = True`` it may run on several launched processes: they share its work, or it only prints.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from ..config.words import words
from ..errors import LongCtxError, UnsupportedModeError
from ..io.launched import launched
from ..io.progress import Stopped

INTERRUPTED = 130  # exit status, as of a command that a shell's Ctrl-C ended


class Commands(TyperGroup):
    """Shows our own errors, and a Ctrl-C, as one line: they say what to do, a traceback would hide it."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LongCtxError as error:
            to = Console(stderr=True)
            message = f"{type(error).__name__}: {error}"
            # A terminal would break a long line inside a word; in a file a line stays whole, to be searched for.
            to.print(message, style="red", markup=False, highlight=False, soft_wrap=not to.is_terminal)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            message = str(stop) if isinstance(stop, Stopped) else "Stopped."
            Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hf-longctx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Head-classified KV caches and sparse prefill for Hugging Face Transformers."""
    if ctx.invoked_subcommand not in MANY and (processes := launched()) > 1:
        raise UnsupportedModeError(
            f"{processes} processes were launched, and each would do all of {ctx.invoked_subcommand}. Run it without "
            f"torchrun and accelerate launch. Several may run: {', '.join(sorted(MANY))}."
        )


MANY: set[str] = set()  # commands of `MANY_PROCESSES`


def _add(name: str, module: ModuleType) -> None:
    if getattr(module, "MANY_PROCESSES", False):
        MANY.add(name)
    group = getattr(module, "app", None)
    if group is None:
        app.command(name, **getattr(module, "SETTINGS", {}))(module.command)
    else:
        app.add_typer(group, name=name)


for _word in words("commands"):
    _add(_word.replace("_", "-"), importlib.import_module(f"{__package__}.{_word}"))


def main() -> None:
    """The console script."""
    app(prog_name="hf-longctx")
