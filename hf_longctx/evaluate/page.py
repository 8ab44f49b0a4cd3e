"""The report of an evaluation: pictures as PNG files, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..config.config import LongCtxConfig
from ..io.atomic import written_whole
from ..io.plots import new_figure, save
from .figures import figures
from .measures import RULE
from .plan import DENSE
from .positions import table_of
from .records import Record
from .sentence import sentences
from .summary import LINE, Summary, line

TEMPLATE = "page.html"
SHOWN = 24  # prompts whose raw outputs are on the page, and questions of each
CUT = 400  # characters of each
PER_INCH = 96  # of a picture, in CSS pixels: its letters have the size of the page's, and a phone scrolls it
COMPARED = LINE.index("to dense")
OUTPUT_NAMES = ("prompt", "variant", "question", "expected", "answer", "score of the prompt")


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        width: in CSS pixels.
        png: the file, in base64.
    """

    caption: str
    width: int
    png: str


def check_plots() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    new_figure(1, 1)


def write_report(folder: Path, summary: Summary, headers: Sequence[Record], records: Iterable[Record]) -> None:
    """``index.html``, which needs no other file, and its pictures beside it; an earlier report is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = []
    for name, caption, figure in figures(summary):
        path = folder / f"{name}.png"
        save(figure, path)
        png = base64.b64encode(path.read_bytes()).decode()
        pictures.append(Picture(caption, round(PER_INCH * figure.get_figwidth()), png))
    with written_whole(folder / "index.html") as path:
        path.write_text(page(summary, headers, list(records), pictures), "utf-8")


def environment() -> Environment:
    """Where the template is, and how it is filled in: every value is text, whatever HTML an answer holds."""
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)


def page(summary: Summary, headers: Sequence[Record], records: Sequence[Record], pictures: Sequence[Picture]) -> str:
    """The page's HTML."""
    verdict, *swept = sentences(summary)
    depth_names, depth_rows = by_depth(summary)
    position_names, by_position = table_of(summary.perplexity_by_position)
    outputs_chosen, outputs = _outputs(records)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=f"hf-longctx eval: {headers[0]['model']}",
            verdict=verdict,
            sentences=[*swept, *conditions(summary, headers)],
            line_names=LINE,
            compared=COMPARED,
            by_task=[line(row, name) for row in summary.by_task for name in summary.variants],
            overall=[line(summary.overall, name) for name in summary.variants],
            perplexity=[(name, f"{value:.4g}") for name, value in summary.perplexity.items()],
            position_names=position_names,
            by_position=by_position,
            pictures=pictures,
            depth_names=depth_names,
            by_depth=depth_rows,
            outputs_chosen=outputs_chosen,
            output_names=OUTPUT_NAMES,
            outputs=outputs,
            headers=[json.dumps(header, indent=1) for header in headers],
        )
    )


def by_depth(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Accuracy of every variant by task, length and depth."""
    rows = [
        [
            row.task,
            str(row.length),
            "any" if row.depth is None else f"{row.depth:g}",
            *(f"{row.cells[name].accuracy:.3f}" for name in summary.variants),
        ]
        for row in summary.by_depth
    ]
    return ["task", "tokens", "depth", *summary.variants], rows


def conditions(summary: Summary, headers: Sequence[Record]) -> list[str]:
    """What was run on what, and what went otherwise than asked for, in sentences."""
    first = headers[0]
    on = first["environment"]
    options = first["settings"]
    greedy = options["answers"] == "greedy"
    own = "dense's" if greedy else "the expected"
    lines = [
        f"{summary.overall.cells[DENSE].cases} prompts per variant, {options['dtype']}, seed {options['seed']}; all "
        f"variants answered the same prompts in turns, {'greedily' if greedy else 'teacher-forced, nothing decoded'}.",
        RULE,
        f"All tokens right{'' if greedy else ', and accuracy'}: share of the questions each token of whose expected "
        "answer is the greedy choice after those before it. NLL: of the expected answers, in nats per token. Same next "
        f"token and KL(dense || variant): along {own} answers. KV MB: bytes really held once the context is "
        "read. Prefill: until the first token; both times are medians over the prompts.",
        f"hf_longctx {on['hf_longctx']}, torch {on['torch']}, transformers {on['transformers']}, Python "
        f"{on['python']}, on {on.get('gpu', on['cpu'])}, threads: {on['threads']}, cores: {on['cores']}.",
    ]
    for name, count in first["retrieval_heads"].items():
        kernels = ", ".join(summary.kernels.get(name, ()))
        kept = LongCtxConfig.from_dict(first["configs"][name]).kept
        lines.append(f"{name}: {count[0]} of {count[1]} KV heads {kept}; kernels: {kernels}.")
    if max(header["processes"] for header in headers) > 1:
        lines.append("Several processes ran at once: times are only comparable between the variants.")
    return lines + [f"{name}: {note}." for name, notes in summary.notes.items() for note in notes]


def _outputs(records: Sequence[Record]) -> tuple[str, list[list[str]]]:
    """(a sentence on the choice, rows): raw answers, those first where a variant is worse than dense by the most."""
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        if "outputs" in record:
            cases.setdefault(record["case"], {})[record["variant"]] = record
    worst = {}
    for case, by_variant in cases.items():
        worst[case] = min(record["score"] - by_variant[DENSE]["score"] for record in by_variant.values())
    chosen = sorted(cases, key=lambda case: worst[case])[:SHOWN]
    rows = []
    for case in chosen:
        for name, record in cases[case].items():
            answers = zip(record["questions"], record["expected"], record["outputs"], strict=True)
            for question, expected, output in list(answers)[:SHOWN]:
                words = (_tail(question), _head(", ".join(expected)), _head(output))
                rows.append([case, name, *words, f"{record['score']:.2f}"])
    sentence = (
        f"{len(chosen)} of {len(cases)} prompts, where variants lose the most to dense first, and of each at most "
        f"{SHOWN} questions. All are in the records."
    )
    return sentence, rows


def _head(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} ..."


def _tail(text: str) -> str:
    return text if len(text) <= CUT else f"... {text[-CUT:]}"
