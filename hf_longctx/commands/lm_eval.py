"""The command ``hf-longctx lm-eval``."""

from __future__ import annotations

import typer
from typer.core import TyperCommand


class Verbatim(TyperCommand):
    """Hands all its arguments on: none is an option of ours, nor is --help."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


MANY_PROCESSES = True  # they share the requests, by lm-eval itself
SETTINGS = {"cls": Verbatim}


def command(ctx: typer.Context) -> None:
    """lm-evaluation-harness with the model 'hf-longctx'. Every argument, --help too, goes to lm-eval's own command."""
    from ..evaluate.lm_eval import command_line

    command_line(ctx.args)
