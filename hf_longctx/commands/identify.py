"""The command ``hf-longctx identify``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..assets import embedded
from ..config.find import YAML
from ..config.words import build, check_word, read_fields, words
from ..errors import ConfigError
from ..io.console import console
from ..io.plots import head_map, save
from ..planning.sizes import parse_tokens
from ._options import (
    DTYPES,
    JSON,
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
    write_json,
)

if TYPE_CHECKING:
    from ..config.config import LongCtxConfig
    from ..identification.methods.base import Method

Share = Annotated[float | None, typer.Option(help="Share of retrieval heads to write.")]
Drop = Annotated[float | None, typer.Option(help="Find the smallest share that loses at most this much of dense.")]
Rise = Annotated[
    float | None, typer.Option(help="Find the smallest share whose answers lose at most so many nats per token.")
]
Tokens = Annotated[str | None, typer.Option(help="Tokens of a document or text the share is measured on (4k).")]
Options = Annotated[list[str] | None, typer.Option("--set", help="An option of the method: --set steps=500. Repeat.")]
Give = Annotated[
    Path | None, typer.Option("--share", help="Also write a .json to give the head map away.", dir_okay=False)
]
Licence = Annotated[str | None, typer.Option(help="Of the numbers in --share, e.g. MIT.", show_default="none")]
ModelId = Annotated[str | None, typer.Option(help="MODEL's hub id in --share, where it is loaded from a folder.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder where duo_gates or ablation saves its state.", show_default="beside --out")
]


def command(
    model: Model,
    out: Yaml,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(words('identification.methods'))}.")] = "two_needle",
    text: Annotated[Path | None, typer.Option(help="File or folder to take the documents' filler from.")] = None,
    retrieval_fraction: Share = None,
    target_drop: Drop = None,
    target_nll: Rise = None,
    measure_tokens: Tokens = None,
    sink: Sink = 64,
    recent: Recent = 256,
    seed: Seed = 0,
    options: Options = None,
    work: Work = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the scores (.png, .pdf or .svg).")] = None,
    share: Give = None,
    licence: Licence = None,
    model_id: ModelId = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure which KV heads of a model need the whole context, and write its config.

    duo_gates also trains on several processes: `accelerate launch -m hf_longctx identify ...`; docs/heads.md has more.
    """
    from ..identification.contribution import about
    from ..identification.heads import identify, needs_tokenizer
    from ..io.processes import Processes

    fields = read_fields(options or [], "--set", "--set steps=500")
    chosen: Method = build("identification.methods", {"method": method, **fields}, "method", "identify")
    check_word(dtype, DTYPES, "--dtype")
    check_output(out, YAML, "--out")
    check_picture(plot, PICTURES, "--plot")
    _check_share(share, licence, model_id)
    finds_share = target_drop is not None or target_nll is not None
    place = device_of(device)
    processes = Processes(place)
    loaded, tokenizer = load_model(embedded(model), dtype, place, needs_tokenizer(chosen, text, finds_share))
    if share is not None:
        about(loaded, licence, model_id)  # what is missing is said before hours of measuring
    config = identify(
        loaded,
        tokenizer,
        method,
        text=text,
        retrieval_fraction=retrieval_fraction,
        target_drop=target_drop,
        target_nll=target_nll,
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
        show(console(), config, out, retrieval_fraction is None and not finds_share)
        _give(share, loaded, config, licence, model_id)


def _write(config: LongCtxConfig, out: Path, plot: Path | None) -> None:
    config.to_yaml(out)
    if plot is not None:
        save(head_map(config), plot)


def _check_share(share: Path | None, licence: str | None, model_id: str | None) -> None:
    """Refuse a share without a licence, and what only a share has a use for."""
    check_output(share, JSON, "--share")
    if share is not None and licence is None:
        raise ConfigError("--share: say under which licence you give the numbers away, e.g. --licence MIT.")
    if share is not None:
        from ..identification.contribution import check_licence

        check_licence(licence)
    for name, given in (("--licence", licence), ("--model-id", model_id)):
        if share is None and given is not None:
            raise ConfigError(f"{name}: got {given!r}, but only --share FILE has a use for it.")


def _give(share: Path | None, model: Any, config: LongCtxConfig, licence: str, model_id: str | None) -> None:
    """Write what ``--share`` asked for, and say what to do with it."""
    if share is None:
        return
    from ..identification.contribution import contribution

    write_json(share, contribution(model, config, licence=licence, model_id=model_id))
    console().print(
        f"To give it away: {share} goes into examples/published_heads of hf_longctx (docs/heads.md, Share a map).",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


MANY_PROCESSES = True  # duo_gates trains on all of them
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
        "  --target-nll 0.02          the smallest share that loses at most 0.02 nats a token\n"
        "  --retrieval-fraction 0.25  this share\n"
        "or later, from the scores in the file:\n"
        f'  patch_model(model, "{out}", heads={{"kv_budget": 0.4}})'
    )
