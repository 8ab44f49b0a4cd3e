"""The command ``hf-longctx plan``."""

from __future__ import annotations

import json as to_json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from ..config.config import LongCtxConfig
from ..config.words import check_word
from ..io.console import console
from ..io.environment import environment
from ..planning.sizes import DTYPES, parse_bytes, parse_tokens
from ._options import check_output
from .bench_memory import Batch, Chunk, Config, Dtype, Memory, Model, Weights

INDENT = " " * 10  # of what continues a line of a plan

Context = Annotated[
    str, typer.Option(help="Tokens of prompt and answer together, in each row: 131072 or 128k (k: 1024).")
]
Reserve = Annotated[
    bool, typer.Option("--reserve", help="Count a LongCtxCache made with max_tokens, without spare room.")
]
Out = Annotated[Path | None, typer.Option(help="Write the chosen config here, a .yaml.", dir_okay=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Write every rung's bytes, and the versions, here.")]


def command(
    model: Model,
    context: Context,
    memory: Memory,
    dtype: Dtype = "bf16",
    batch: Batch = 1,
    chunk: Chunk = "4096",
    weights: Weights = None,
    config: Config = None,
    reserve: Reserve = False,
    out: Out = None,
    json: Json = None,
) -> None:
    """The best config for so many tokens in so much memory, before anything is loaded; refused if none fits."""
    check_word(dtype, DTYPES, "--dtype")
    for path, endings, option in ((out, (".yaml", ".yml"), "--out"), (json, (".json",), "--json")):
        if path is not None:
            check_output(path, endings, option)
    found = LongCtxConfig.plan(
        model,
        context=parse_tokens(context, "--context"),
        memory=parse_bytes(memory, "--memory"),
        dtype=dtype,
        batch=batch,
        chunk=parse_tokens(chunk, "--prefill-chunk-size", 0),
        weights=None if weights is None else parse_bytes(weights, "--weights"),
        config=config,
        reserve=reserve,
    )
    to = console()
    for line in str(found).splitlines():
        if not line.startswith(" "):  # not a line of the table
            line = textwrap.fill(line, to.width, subsequent_indent=INDENT, break_on_hyphens=False)
        to.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        found.config.to_yaml(out)
        to.print(f'written   {out}: patch_model(model, "{out}")', markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        json.write_text(to_json.dumps({"environment": environment(), **found.as_dict()}, indent=1) + "\n", "utf-8")
