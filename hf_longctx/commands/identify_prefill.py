"""The command ``hf-longctx identify-prefill``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..assets import embedded
from ..config.find import YAML
from ..config.words import check_word, dump
from ..io.console import console
from ..planning.sizes import parse_tokens
from ._options import DTYPES, Device, Dtype, Model, Seed, Yaml, check_output, device_of, load_model

if TYPE_CHECKING:
    from ..config.config import LongCtxConfig

LENGTH = "32768, or what there is"


def command(
    model: Model,
    out: Yaml,
    config: Annotated[
        str, typer.Option(help="What the patterns are added to: auto, a shipped name, a .yaml, or a Hub repository.")
    ] = ("auto"),
    text: Annotated[Path | None, typer.Option(help="File or folder to read the prompt from.")] = None,
    length: Annotated[str | None, typer.Option(help="Tokens of the prompt, e.g. 32k.", show_default=LENGTH)] = None,
    cost: Annotated[float, typer.Option(help="Share of the key blocks that a head may read.")] = 0.2,
    seed: Seed = 0,
    work: Annotated[Path | None, typer.Option(help="Folder for finished layers.", show_default="beside --out")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Find the prefill pattern of every query head that keeps the most attention at a given cost, and write it.

    A search that was interrupted goes on where it was when the same command is run again.
    """
    from ..identification.prefill import identify_prefill

    check_word(dtype, DTYPES, "--dtype")
    check_output(out, YAML, "--out")
    loaded, tokenizer = load_model(embedded(model), dtype, device_of(device))
    written = identify_prefill(
        loaded,
        tokenizer,
        config=config,
        text=text,
        length=None if length is None else parse_tokens(length, "--length"),
        cost=cost,
        seed=seed,
        work=out.with_suffix(".work") if work is None else work,
        progress=True,
    )
    written.to_yaml(out)
    show(console(), written, out)


def show(console: Console, config: LongCtxConfig, out: Path) -> None:
    """Which budgets the heads got, what they keep, and what to do with it."""
    from ..identification.prefill import TABLE

    table = config.prefill.tables[TABLE]
    heads = [index for row in table.map for index in row]
    listing = Table(title="Patterns of the query heads")
    listing.add_column("pattern")
    listing.add_column("heads", justify="right")
    for index, spec in enumerate(table.budgets):
        fields = dump(spec, "pattern")
        options = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "pattern")
        listing.add_row(f"{fields['pattern']}: {options}", str(heads.count(index)))
    console.print(listing)
    facts = table.source
    console.print(
        f"They keep {facts['mean_kept_mass']:.1%} of the attention mass, reading {facts['mean_density']:.1%} of the "
        f"key blocks of {facts['length']} tokens. Written to {out}.\n"
        f'Use it: patch_model(model, "{out}")',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if "note" in facts:
        console.print(facts["note"], markup=False, highlight=False, soft_wrap=True)
