"""The command ``hf-longctx plan``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from ..config.config import LongCtxConfig
from ..config.find import YAML
from ..io.console import console
from ..io.environment import environment
from ..planning.sizes import parse_tokens
from ._options import (
    JSON,
    Batch,
    Json,
    Memory,
    PlannedChunk,
    PlannedConfig,
    PlannedDtype,
    PlannedModel,
    Weights,
    check_output,
    planned_settings,
    short_names,
    write_json,
)

SETTINGS = short_names(chunk="prefill-chunk-size")
MANY_PROCESSES = True  # it only calculates
INDENT = " " * 10  # of what continues a line of a plan

Context = Annotated[
    str, typer.Option(help="Tokens of prompt and answer together, of each sequence: 131072 or 128k (k: 1024).")
]
Reserve = Annotated[
    bool, typer.Option("--reserve", help="Count a LongCtxCache made with max_tokens, without spare room.")
]
Out = Annotated[Path | None, typer.Option(help="Write the chosen config here, a .yaml.", dir_okay=False)]


def command(
    model: PlannedModel,
    context: Context,
    memory: Memory,
    dtype: PlannedDtype = "bf16",
    batch: Batch = 1,
    chunk: PlannedChunk = "4096",
    weights: Weights = None,
    config: PlannedConfig = None,
    reserve: Reserve = False,
    out: Out = None,
    json: Json = None,
) -> None:
    """The best config for so many tokens in so much memory, before anything is loaded; refused if none fits."""
    settings = planned_settings(memory, dtype, batch, chunk, weights)
    check_output(out, YAML, "--out")
    check_output(json, JSON, "--json")
    tokens = parse_tokens(context, "--context")
    plan = LongCtxConfig.plan(model, context=tokens, config=config, reserve=reserve, **settings)
    to = console()
    for line in str(plan).splitlines():
        if not line.startswith(" "):  # not a line of the table
            line = textwrap.fill(line, to.width, subsequent_indent=INDENT, break_on_hyphens=False)
        to.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        plan.config.to_yaml(out)
        to.print(f'written   {out}: patch_model(model, "{out}")', markup=False, highlight=False, soft_wrap=True)
    write_json(json, {"environment": environment(), **plan.as_dict()})
