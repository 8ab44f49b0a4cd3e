"""The command ``hf-longctx bench serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError
from ..io.console import console
from ..io.environment import environment
from ..io.progress import Progress
from ._options import JSON, Json, check_output, write_json

Url = Annotated[str, typer.Option(help="Of a server that hf-longctx serve runs.")]
Text = Annotated[
    Path | None, typer.Option(help="The documents are cut from it.", show_default="a book", dir_okay=False)
]


def command(
    url: Url = "http://localhost:8000",
    clients: Annotated[int, typer.Option(help="Clients that ask at once.", min=1)] = 8,
    documents: Annotated[int, typer.Option(help="Documents that they ask about.", min=1)] = 3,
    questions: Annotated[int, typer.Option(help="Questions about each.", min=1)] = 4,
    words: Annotated[int, typer.Option(help="Words of a document.", min=5)] = 600,
    tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens of an answer, at most.", min=1)] = 16,
    seconds: Annotated[int, typer.Option(help="How long they ask.", min=1)] = 300,
    text: Text = None,
    seed: Annotated[int, typer.Option(help="Random seed of what is asked when.")] = 0,
    json: Json = None,
) -> None:
    """Many clients at once on a running server: are the answers those of one alone, how late, and what it holds."""
    check_output(json, JSON, "--json")
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("bench serve: openai is not installed. Run pip install 'hf-longctx[serve]'.")
    from ..bench.serve import LoadSettings, run

    settings = LoadSettings(url, clients, documents, questions, words, tokens, seconds, text, seed)
    with Progress("bench serve", seconds, "seconds") as bar:
        data = run(settings, bar.advance)
    write_json(json, {"benchmark": "serve", "environment": environment(), **data})
    show(console(), data)


def show(to: Console, data: dict[str, Any]) -> None:
    """What came of the load, in a few lines."""
    s, took = data["settings"], data["seconds"]
    asked = f"{s['clients']} clients, {s['documents']} documents of {s['words']} words, {took:.0f} s"
    wrong = f"{data['other']} other than alone" if data["other"] else "all as alone"
    held = f"at most {data['bytes'] / 1e6:.1f} MB in {data['stored']:.0f} prompts"
    lines = [
        f"bench serve   {data['model']}: {asked}",
        f"answers       {data['answers']} ({data['answers'] / took:.2f} a second), {wrong}; {data['left']} left early",
        f"whole answer  {_pair(data['whole'])}",
        f"first token   {_pair(data['first'])}",
        f"kept          {held}",
    ]
    if data["resident"]["last"] is not None:
        memory = " to ".join(f"{data['resident'][when] / 1e6:.0f}" for when in ("first", "last"))
        handles = " to ".join(f"{data['handles'][when]:.0f}" for when in ("first", "last"))
        lines.append(f"process       {memory} MB resident, {handles} open files")
    for line in lines:
        to.print(line, markup=False, highlight=False, soft_wrap=True)


def _pair(seconds: dict[str, float | None]) -> str:
    if seconds["p50"] is None:
        return "none"
    return f"p50 {seconds['p50']:.2f} s, p95 {seconds['p95']:.2f} s"
