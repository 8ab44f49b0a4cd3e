"""The commands ``hf-longctx configs`` and ``hf-longctx configs show NAME``."""

from __future__ import annotations

import os
from collections import Counter
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.config import LongCtxConfig
from ..config.files import shipped
from ..config.find import load_named, resolve
from ..config.head_map import NONE
from ..config.hub import PIN
from ..config.ranking import published_table, ranked
from ..config.words import spec_word
from ..errors import ConfigError
from ..io.console import console
from ._options import short_names

app = typer.Typer(help="The shipped configs, one per checkpoint: a list without a command, or one of them.")

MANY_PROCESSES = True  # it only prints
LENGTHS = {"32k": 32768, "128k": 131072}  # tokens
MARKS = {"R": "R", "S": ".", NONE: "-"}  # told apart without colour too
SHADES = ("bold green", "green", "yellow", "bright_black")  # of the quarters of all heads, best scores first

SHARE = "Draw this share of retrieval heads, 0 to 1. Or --fraction."


@app.callback(invoke_without_command=True)
def configs(context: typer.Context) -> None:
    """List the shipped configs, best first: checkpoint, source of the head map, KV memory with 2 bytes per number."""
    if context.invoked_subcommand is None:
        _list(console())


@app.command("show", **short_names(fraction="retrieval-fraction"))
def show(
    name: Annotated[
        str, typer.Argument(help="Shipped config, one of its hub ids, YAML, Hub repository, or a model's folder.")
    ],
    use: Annotated[str | None, typer.Option(help="Draw the head map of this alternative.")] = None,
    retrieval_fraction: Annotated[float | None, typer.Option(help=SHARE)] = None,
) -> None:
    """The facts of one config, and its head map: one line per layer, one cell per KV head."""
    overrides = {"use": use, "retrieval_fraction": retrieval_fraction}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    config = find_config(name)
    config = config.override(heads=overrides) if overrides else config
    to = console()
    _facts(to, name, config)
    _head_map(to, config)


@app.command()
def reference() -> None:
    """Every key of a config, its bounds, default and meaning, as Markdown: docs/reference.md."""
    from ..config.reference import reference as text

    typer.echo(text(), nl=False)


@app.command()
def models() -> None:
    """The model types that can be patched, and which cannot and why, as Markdown: docs/models.md."""
    from ..model.models_page import models_page

    typer.echo(models_page(), nl=False)


@app.command("table")
def print_table(
    best: Annotated[int | None, typer.Option(min=1, help="So many rows only; the README has 10.")] = None,
) -> None:
    """The published checkpoints as Markdown, best first: the table of docs/heads.md."""
    typer.echo(published_table(best), nl=False)


def _list(console: Console) -> None:
    title = "Best first. KV MB of one row: dense -> patched, 2 bytes per number"
    table = Table(title=title, box=box.HORIZONTALS, show_lines=True, show_edge=False, pad_edge=False)
    table.add_column("config, checkpoint, heads from", overflow="fold")
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("KV MB", no_wrap=True)
    for one in ranked():
        config = one.config
        first, *more = config.model.ids
        said = Text.assemble(
            (one.name, "bold"), f"\n{first}{f', +{len(more)} more' if more else ''}\n", _origin(config)
        )
        table.add_row(said, f"{_share(config):.1%}", "\n".join(_memory(config)))
    console.print(table)
    console.print("share: of the KV heads that keep every token. `hf-longctx configs show NAME` draws the head map.")


def find_config(name: str) -> LongCtxConfig:
    """The config that a name stands for: as of ``load_named``, or of a model's folder. No weight is read.

    Raises:
        ConfigError: there is none; the message says what there is.
    """
    if not os.path.isdir(name) or name in shipped():
        return load_named(name, "NAME")
    from transformers import AutoConfig  # a second, which only a folder is worth

    try:
        hf_config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: a folder without a config.json that Transformers reads: {error}") from None
    return resolve("auto", hf_config, name)


def _facts(console: Console, name: str, config: LongCtxConfig) -> None:
    """Everything the config says but its numbers, a line of text each."""
    model = config.model
    heads = config.heads
    grid = Table(title=name, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    if model.ids:
        grid.add_row("checkpoints", "\n".join(model.ids))
    grid.add_row(
        "model",
        f"{model.model_type}: {model.num_hidden_layers} layers, {model.num_attention_heads} query heads, "
        f"{model.num_key_value_heads} KV heads, head_dim {model.head_dim}",
    )
    if model.max_position_embeddings is not None:
        grid.add_row("made for", f"{model.max_position_embeddings} tokens")
    grid.add_row("heads from", _origin(config))
    if PIN in heads.source:
        grid.add_row("  read from", Text(f"the Hub, {_plain(heads.source[PIN])}"))
    for key in [key for key in heads.active.source if key not in ("method", "from", PIN)]:
        grid.add_row(f"  {key}", Text(_plain(heads.active.source[key])))
    if heads.use is None:
        grid.add_row("  confidence", heads.confidence)
    if heads.use is None and heads.confidence == "none":
        grid.add_row("  to measure", Text(_how_to_measure(model.ids[0] if model.ids else "MODEL")))
    grid.add_row("retrieval", f"{config.retrieval_heads} of {config.kv_heads} KV heads ({_share(config):.1%})")
    grid.add_row("KV MB", "\n".join(_memory(config)) + "\nof one row, dense -> patched, 2 bytes per number")
    for other, alternative in heads.alternatives.items():
        source = alternative.source
        used = " (drawn below)" if other == heads.use else ""
        grid.add_row("alternative", Text(f"{other}{used}\n  {source.get('from', '?')}, {source.get('model', '?')}"))
    for table_name, table in config.prefill.tables.items():
        grid.add_row("prefill table", Text(f"{table_name}\n{_budgets(table)}"))
        if "note" in table.source:
            grid.add_row("  note", Text(table.source["note"]))
    console.print(grid)


def _head_map(console: Console, config: LongCtxConfig) -> None:
    """A line per layer, a mark per KV head; a colour per quarter of the scores where there are scores."""
    scores = config.heads.active.scores
    roles = config.roles()
    gap = " " if 2 * len(roles[0]) + 12 <= console.width else ""
    shades = _shades(scores, config.layers) if scores is not None else [[""] * len(row) for row in roles]
    console.print(f"\n{MARKS['R']} retrieval: keeps every token    {MARKS['S']} streaming: keeps a constant number")
    if len(config.layers) < len(roles):
        console.print(f"{MARKS[NONE]} no role: in this layer the model itself does not read the whole text")
    if scores is not None:
        names = ("best", "second", "third", "last")
        legend = Text("colours: ").append_text(
            Text(", ").join(Text(f"{word} quarter", shade) for word, shade in zip(names, SHADES, strict=True))
        )
        console.print(legend.append(" of the scores"))
    columns = f"layer, one mark per KV head 0 to {len(roles[0]) - 1}, retrieval heads of the layer"
    console.print(columns, style="dim", highlight=False)
    for layer, (row, colours) in enumerate(zip(roles, shades, strict=True)):
        line = Text(f"{layer:>3}  ")
        line.append_text(Text(gap).join(Text(MARKS[role], colour) for role, colour in zip(row, colours, strict=True)))
        console.print(line.append(f"  {row.count('R')}"), highlight=False, soft_wrap=True)


def _shades(scores: tuple[tuple[float, ...], ...], layers: tuple[int, ...]) -> list[list[str]]:
    """The colour of every head by its rank among those of ``layers``, equal scores alike; of other heads none."""
    ranked = sorted((score for layer in layers for score in scores[layer]), reverse=True)
    first = {score: place for place, score in reversed(list(enumerate(ranked)))}
    return [
        [SHADES[first[score] * len(SHADES) // len(ranked)] if layer in layers else "" for score in row]
        for layer, row in enumerate(scores)
    ]


def _origin(config: LongCtxConfig) -> str:
    """Method and repository of the head map in use."""
    source = config.heads.active.source
    if config.heads.confidence == "none" and config.heads.use is None:
        return "heads not measured: run identify"
    low = " (low confidence)" if config.heads.confidence == "low" and config.heads.use is None else ""
    return f"{source.get('method', '?')}{low}, {source.get('from', '?')}"


def _how_to_measure(model_id: str) -> str:
    """The command that measures the heads of a model, and what gives the result away."""
    return (
        f"hf-longctx identify {model_id} --out my.yaml\n"
        "To give the map away: --share my.json --licence LICENCE as well (docs/heads.md, Share a map)."
    )


def _share(config: LongCtxConfig) -> float:
    return config.retrieval_heads / config.kv_heads


def _memory(config: LongCtxConfig) -> list[str]:
    """One line per length, in columns."""
    pairs = {name: config.kv_bytes(tokens) for name, tokens in LENGTHS.items()}
    return [f"{name:>4} {dense / 1e6:>5.0f} -> {patched / 1e6:>5.0f}" for name, (dense, patched) in pairs.items()]


def _budgets(table: Any) -> str:
    """The budgets of a prefill table, most used first, with the number of query heads each has."""
    counts = Counter(index for row in table.map for index in row)
    lines = []
    for index, count in counts.most_common():
        spec = table.budgets[index]
        fields = ", ".join(f"{key} {value}" for key, value in vars(spec).items())
        lines.append(f"  {count:>5} query heads: {spec_word(spec)}  {fields}".rstrip())
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
