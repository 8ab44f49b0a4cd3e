"""The command ``hf-longctx identify``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..assets import embedded
from ..config.find import YAML
from ..config.words import build, check_word, read_fields, words
from ..io.console import console
from ..io.plots import head_map, save
from ..planning.sizes import parse_tokens
from ._options import (
    DTYPES,
    PICTURES,
    Device,
    Dtype,
    Model,
    Recent,
    Seed,
    Sink,
    Yaml,
    check_output,
    check_picture,
    device_of,
    load_model,
)

if TYPE_CHECKING:
    from ..config.config import LongCtxConfig
    from ..identification.methods.base import Method

Share = Annotated[float | None, typer.Option(help="Share of retrieval heads to write.")]
Drop = Annotated[float | None, typer.Option(help="Find the smallest share that loses at most this much of dense.")]
Tokens = Annotated[str | None, typer.Option(help="Tokens of a document or text --target-drop is measured on (4k).")]
Options = Annotated[list[str] | None, typer.Option("--set", help="An option of the method: --set steps=500. Repeat.")]
Work = Annotated[Path | None, typer.Option(help="Folder where duo_gates saves its state.", show_default="beside --out")]


def command(
    model: Model,
    out: Yaml,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(words('identification.methods'))}.")] = "two_needle",
    text: Annotated[Path | None, typer.Option(help="File or folder to take the documents' filler from.")] = None,
    retrieval_fraction: Share = None,
    target_drop: Drop = None,
    measure_tokens: Tokens = None,
    sink: Sink = 64,
    recent: Recent = 256,
    seed: Seed = 0,
    options: Options = None,
    work: Work = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the scores (.png, .pdf or .svg).")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure which KV heads of a model need the whole context, and write its config.

    duo_gates also trains on several processes: `accelerate launch -m hf_longctx identify ...`; docs/heads.md has more.
    """
    from ..identification.heads import identify, needs_tokenizer
    from ..io.processes import Processes

    fields = read_fields(options or [], "--set", "--set steps=500")
    chosen: Method = build("identification.methods", {"method": method, **fields}, "method", "identify")
    check_word(dtype, DTYPES, "--dtype")
    check_output(out, YAML, "--out")
    check_picture(plot, PICTURES, "--plot")
    place = device_of(device)
    processes = Processes(place)
    loaded, tokenizer = load_model(embedded(model), dtype, place, needs_tokenizer(chosen, text, target_drop))
    config = identify(
        loaded,
        tokenizer,
        method,
        text=text,
        retrieval_fraction=retrieval_fraction,
        target_drop=target_drop,
        measure_tokens=None if measure_tokens is None else parse_tokens(measure_tokens, "--measure-tokens"),
        sink=sink,
        recent=recent,
        seed=seed,
        work=work if work is not None or not chosen.saves else out.with_suffix(".work"),
        progress=processes.main,
        **fields,
    )
    if processes.main:
        _write(config, out, plot)
        show(console(), config, out, retrieval_fraction is None and target_drop is None)


def _write(config: LongCtxConfig, out: Path, plot: Path | None) -> None:
    config.to_yaml(out)
    if plot is not None:
        save(head_map(config), plot)


DEFAULTS = {0.5: "Half of the heads", 0.25: "A quarter of the heads"}


def show(console: Console, config: LongCtxConfig, out: os.PathLike, default: bool = False) -> None:
    """What was found, in a few lines, and what to do with it; ``default``: nobody said which share it should be."""
    curve = config.heads.measured.get("curve", [])
    if curve:
        table = Table(title="The share, measured against the dense model")
        for name in curve[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in curve:
            table.add_row(*map(str, row.values()))
        console.print(table)
    console.print(
        f"{config.retrieval_heads} of {config.kv_heads} KV heads are retrieval heads "
        f"(retrieval_fraction {config.heads.retrieval_fraction}). Written to {out}.\n"
        f'Use it: patch_model(model, "{out}")' + (_how_to_choose(config, out) if default else ""),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _how_to_choose(config: LongCtxConfig, out: os.PathLike) -> str:
    share = config.heads.retrieval_fraction
    return (
        f"\n\n{DEFAULTS.get(share, f'This share ({share:.1%})')} is a default, nothing measured it. To choose:\n"
        "  --target-drop 0.02         the smallest share that loses at most 2 % of dense\n"
        "  --retrieval-fraction 0.25  this share\n"
        "or later, from the scores in the file:\n"
        f'  patch_model(model, "{out}", heads={{"kv_budget": 0.4}})'
    )
