"""The command ``hf-longctx eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..assets import embedded
from ..config.words import check_word, make, words
from ..io.console import console, tables
from ..planning.sizes import parse_tokens
from ..tasks import ANSWERS, HAYSTACKS, MODES, tasks_from
from ._options import DTYPES, Config, Device, Dtype, Model, Seed, device_of, load_model

if TYPE_CHECKING:
    from ..evaluate.summary import Summary

MANY_PROCESSES = True  # they share the cases
THERE = ", ".join(words("tasks.synthetic"))
TASKS = f"Commas between tasks, colons before fields (needle:variant=multi_key, jsonl:file=mine.jsonl): {THERE}."
SHORT = ("tokens", "variant", "accuracy", "to dense", "95% interval", "KV of dense", "prefill s", "decode ms")
SHORT += ("NLL", "NLL to dense", "NLL interval", "all tokens right")
SWEEP = "A field of the config and its values, one more variant each: retrieval_fraction=0.1,0.25; budget=0.5,0.2."
Depths = Annotated[str, typer.Option(help="Where the facts are, 0 to 1. Empty: anywhere.")]
Sweep = Annotated[str | None, typer.Option(help=SWEEP)]
Text = Annotated[Path | None, typer.Option(help="File or folder to take the prompts' filler from.")]
Haystack = Annotated[str | None, typer.Option(help=f"Filler without a text: {', '.join(HAYSTACKS)}.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put the tokenizer's chat template around every question.")]
PERPLEXITY = "A UTF-8 text whose perplexity is measured too, by position as well; book: the novel of --haystack book."
Ppl = Annotated[Path | None, typer.Option(help=PERPLEXITY, dir_okay=False)]
WINDOW = "the longest of --lengths"
Window = Annotated[str | None, typer.Option(help="Tokens a token of it is predicted in.", show_default=WINDOW)]
Chunk = Annotated[str | None, typer.Option(help="Tokens of a context per forward.", show_default="all")]
Mode = Annotated[str, typer.Option(help=f"How the questions about one context are asked: {', '.join(MODES)}.")]

HOW = f"{', '.join(ANSWERS)}: decoded; or only how likely the expected answers are, several times faster."
Answers = Annotated[str, typer.Option(help=HOW)]


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.", file_okay=False)],
    tasks: Annotated[str, typer.Option(help=TASKS)],
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, its question included: 512,2k (k: 1024).")],
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Prompts per task, length and depth.")] = 8,
    config: Config = "auto",
    sweep: Sweep = None,
    seed: Seed = 0,
    mode: Mode = MODES[0],
    answers: Answers = ANSWERS[0],
    text: Text = None,
    haystack: Haystack = None,
    chat: Chat = False,
    perplexity: Ppl = None,
    perplexity_window: Window = None,
    prefill_chunk_size: Chunk = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Run tasks dense and patched on the same prompts: accuracy, agreement, KV memory, times, and a report to open.

    Killed, it goes on where it was when the same command is run again.

    It also runs on several processes: `accelerate launch -m hf_longctx eval ...`; docs/evaluation.md has more.
    """
    from ..evaluate.page import check_plots
    from ..evaluate.plan import Options, listed, values_of
    from ..evaluate.run import evaluate
    from ..io.processes import Processes

    check_word(dtype, DTYPES, "--dtype")
    check_plots()
    options = {
        "lengths": [parse_tokens(one, "--lengths") for one in listed(lengths, "--lengths", "512,2048")],
        "depths": listed(depths, "--depths", "0,0.5,1") if depths.strip() else [],
        "samples": samples,
        "seed": seed,
        "mode": mode,
        "answers": answers,
        "prefill_chunk_size": _tokens(prefill_chunk_size, "--prefill-chunk-size"),
        "perplexity_window": _tokens(perplexity_window, "--perplexity-window", 2),
    }
    tasks_from(tasks)  # these three: what is wrong is refused before the model loads
    make(Options, options)
    if sweep is not None:
        list(values_of(sweep))
    place = device_of(device)
    main = Processes(place).main
    loaded, tokenizer = load_model(embedded(model), dtype, place)
    summary = evaluate(
        loaded,
        tokenizer,
        out,
        tasks=tasks,
        config=config,
        sweep=sweep,
        text=text,
        haystack=haystack,
        chat=chat,
        perplexity=perplexity,
        name=model,
        progress=main,
        **options,
    )
    if main:
        show(console(), summary, out)


def _tokens(text: str | None, option: str, least: int = 1) -> int | None:
    return None if text is None else parse_tokens(text, option, least)


def show(console: Console, summary: Summary, out: Path) -> None:
    """What was found in a sentence per variant, the figures per length, and where the report is."""
    from ..evaluate.positions import table_of
    from ..evaluate.sentence import sentences
    from ..evaluate.summary import LINE, line

    for sentence in sentences(summary):
        console.print(sentence, markup=False, highlight=False)
    rows = []
    for row in summary.by_length:
        rows += [None] * bool(rows)
        for name in row.cells:
            cells = dict(zip(LINE, line(row, name), strict=True))
            if cells["to dense"].endswith("worse"):
                cells["to dense"] = f"[bold]{cells['to dense']}[/]"
            rows.append([cells[column] for column in SHORT])
    for table in tables("eval: all tasks together", SHORT, rows, console.width, left=("variant",), key=2):
        console.print(table)
    for name, value in summary.perplexity.items():
        console.print(f"perplexity, {name}: {value:.4g}", markup=False, highlight=False)
    if summary.perplexity_by_position:
        names, rows = table_of(summary.perplexity_by_position)
        for table in tables("perplexity by position", names, rows, console.width, left=("position",), key=2):
            console.print(table)
    for name, notes in summary.notes.items():
        for note in notes:
            console.print(f"{name}: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The report: {out / 'report' / 'index.html'}", markup=False, highlight=False, soft_wrap=True)
