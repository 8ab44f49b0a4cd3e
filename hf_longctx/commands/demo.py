"""The command ``hf-longctx demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..io.console import console


def command(
    length: Annotated[int, typer.Option(help="Tokens of a prompt with its question.", min=512, max=8192)] = 4096,
    notes: Annotated[int, typer.Option(help="Notes hidden in a prompt; each is asked for.", min=1, max=24)] = 16,
    prompts: Annotated[int, typer.Option(help="Number of prompts.", min=1)] = 13,
    seed: Annotated[int, typer.Option(help="Random seed of the prompts.")] = 2024,
) -> None:
    """A small trained model answers questions about long prompts: dense, patched, and with the wrong heads patched."""
    from ._demo import run

    run(length, notes, prompts, seed, console())
