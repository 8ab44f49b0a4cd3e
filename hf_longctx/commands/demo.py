"""The command ``hf-longctx demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from ..io.console import console

Real = Annotated[bool, typer.Option("--real", help="SmolLM2-135M-Instruct reads a book, and answers in English.")]
Length = Annotated[int, typer.Option(help="Tokens of a prompt with its question.", min=512, max=8192)]
Notes = Annotated[
    int | None,
    typer.Option(help="Notes hidden in a prompt; each is asked for.", min=1, max=24, show_default="16; with --real 4"),
]
Prompts = Annotated[int | None, typer.Option(help="Number of prompts.", min=1, show_default="13; with --real 3")]
Model = Annotated[str | None, typer.Option(help="With --real: another model, a hub id or a folder.")]
Config = Annotated[str | None, typer.Option(help="With --real: what to patch it with.", show_default="auto")]


def command(
    real: Real = False,
    length: Length = 4096,
    notes: Notes = None,
    prompts: Prompts = None,
    seed: Annotated[int, typer.Option(help="Random seed of the prompts.")] = 2024,
    model: Model = None,
    config: Config = None,
) -> None:
    """A small trained model answers questions about long prompts: dense, patched, and with the wrong heads patched."""
    for name, value in (("--model", model), ("--config", config)):
        if value is not None and not real:
            raise ConfigError(f"{name}: got {value!r}, but only --real has a use for it.")
    given = {"length": length, "notes": notes, "prompts": prompts, "model": model, "config": config}
    given = {name: value for name, value in given.items() if value is not None}
    if real:
        from ._demo_real import run
    else:
        from ._demo import run

    run(**given, seed=seed, console=console())
