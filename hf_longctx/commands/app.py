"""``hf-longctx``: the commands of the library."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import LongCtxError
from ..io.console import console
from ..io.progress import Stopped
from . import bench as bench
from . import configs as config_commands
from .compare import command as compare
from .eval import command as evaluate
from .identify import command as identify
from .identify_prefill import command as identify_prefill
from .plan import command as plan

INTERRUPTED = 130  # exit status, as of a command that a shell's Ctrl-C ended


class Commands(TyperGroup):
    """Shows our own errors, and a Ctrl-C, as one line: they say what to do, a traceback would hide it."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LongCtxError as error:
            to, said = Console(stderr=True), f"{type(error).__name__}: {error}"
            # A terminal would break a long line inside a word; in a file a line stays whole, to be searched for.
            to.print(said, style="red", markup=False, highlight=False, soft_wrap=not to.is_terminal)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            told = str(stop) if isinstance(stop, Stopped) else "Stopped."
            Console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


class Verbatim(TyperCommand):
    """Hands all its arguments on: none is an option of ours, nor is --help."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-longctx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Head-classified KV caches and sparse prefill for Hugging Face Transformers."""


@app.command()
def demo(
    length: Annotated[int, typer.Option(help="Tokens of a prompt with its question.", min=512, max=8192)] = 4096,
    notes: Annotated[int, typer.Option(help="Notes hidden in a prompt; each is asked for.", min=1, max=24)] = 16,
    prompts: Annotated[int, typer.Option(help="Number of prompts.", min=1)] = 13,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 2024,
) -> None:
    """A small trained model answers questions about long prompts: dense, patched, and with the wrong heads patched."""
    from .demo import run

    run(length, notes, prompts, seed, console())


app.command("identify")(identify)
app.command("identify-prefill")(identify_prefill)
app.command("compare")(compare)
app.command("eval")(evaluate)


@app.command("lm-eval", cls=Verbatim)
def lm_eval(ctx: typer.Context) -> None:
    """lm-evaluation-harness with the model 'hf-longctx'. Every argument, --help too, goes to lm-eval's own command."""
    from ..evaluate.lm_eval import command_line

    command_line(ctx.args)


app.add_typer(config_commands.app, name="configs")
app.add_typer(bench.app, name="bench")
app.command("plan")(plan)


def main() -> None:
    """The console script."""
    app(prog_name="hf-longctx")
