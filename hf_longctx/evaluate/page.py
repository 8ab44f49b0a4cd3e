"""The report of an evaluation: pictures as PNG files, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..io.atomic import written_whole
from ..io.plots import new_figure, save
from .figures import figures
from .measures import RULE
from .plan import DENSE
from .records import Record
from .sentence import sentences
from .summary import LINE, Summary, line

SHOWN = 24  # prompts whose raw outputs are on the page, and questions of each
CUT = 400  # characters of each
PER_INCH = 96  # of a picture, in CSS pixels: its letters have the size of the page's, and a phone scrolls it
LOST = LINE.index("to dense")
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
# Words of a table are never broken: where it is too wide, it scrolls. What was said may be one long word, which is.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } h1, p { overflow-wrap: break-word; }
.verdict { font-size: 1.15em; font-weight: bold; }
.wide, figure { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { background: #f4f4f4; vertical-align: bottom; } td { white-space: nowrap; } .text, .said { text-align: left; }
td.text { white-space: normal; }
td.said { min-width: 12em; white-space: pre-wrap; overflow-wrap: anywhere; }
td.worse { font-weight: bold; background: #fbe3df; }
figure { margin: 1em 0; } figcaption { color: #555; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
"""


def check_plots() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    new_figure(1, 1)


def write_report(folder: Path, summary: Summary, headers: Sequence[Record], records: Iterable[Record]) -> None:
    """``index.html``, which needs no other file, and its pictures beside it; an earlier report is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    shown = []
    for name, caption, figure in figures(summary):
        path = folder / f"{name}.png"
        save(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
        said, width = escape(caption), round(PER_INCH * figure.get_figwidth())
        image = f'<img alt="{said}" width="{width}" src="data:image/png;base64,{data}">'
        shown.append(f"<figure>{image}<figcaption>{said}</figcaption></figure>")
    with written_whole(folder / "index.html") as path:
        path.write_text(page(summary, headers, list(records), shown), "utf-8")


def page(summary: Summary, headers: Sequence[Record], records: Sequence[Record], shown: Sequence[str]) -> str:
    """The page's HTML; ``shown``: its pictures, as HTML."""
    title = f"hf-longctx eval: {headers[0]['model']}"
    first, *swept = sentences(summary)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(first)}</p>',
        *(f"<p>{escape(line)}</p>" for line in (*swept, *told(summary, headers))),
        "<h2>By task and length</h2>",
        table(LINE, [line(row, name) for row in summary.by_task for name in summary.variants], text=3, mark=LOST),
        "<h2>Over everything</h2>",
        table(LINE, [line(summary.overall, name) for name in summary.variants], text=3, mark=LOST),
        *_perplexity(summary),
        "<h2>Pictures</h2>",
        *shown,
        "<h2>By depth</h2>",
        table(*by_depth(summary), text=1),
        "<h2>What was said</h2>",
        *_outputs(records),
        "<h2>Settings and versions</h2>",
        *(f"<details><summary>process {i}</summary>{_json(header)}</details>" for i, header in enumerate(headers)),
    ]
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{VIEWPORT}<title>{escape(title)}</title>'
    return f"{head}<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


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


def told(summary: Summary, headers: Sequence[Record]) -> list[str]:
    """What was run on what, and what went otherwise than asked for, in sentences."""
    first = headers[0]
    on, options = first["environment"], first["settings"]
    lines = [
        f"{summary.overall.cells[DENSE].cases} prompts per variant, {options['dtype']}, seed {options['seed']}; all "
        "variants answered the same prompts in turns, greedily.",
        RULE,
        "Same next token and KL(dense || variant): along dense's answers. KV MB: bytes really held once the context is "
        "read. Prefill: until the first token; both times are medians over the prompts.",
        f"hf_longctx {on['hf_longctx']}, torch {on['torch']}, transformers {on['transformers']}, Python "
        f"{on['python']}, on {on.get('gpu', on['cpu'])}, threads: {on['threads']}, cores: {on['cores']}.",
    ]
    for name, count in first["retrieval_heads"].items():
        kernels = ", ".join(summary.kernels.get(name, ()))
        lines.append(f"{name}: {count[0]} of {count[1]} KV heads keep every token; kernels: {kernels}.")
    if max(header["processes"] for header in headers) > 1:
        lines.append("Several processes ran at once: times are only comparable between the variants.")
    return lines + [f"{name}: {note}." for name, notes in summary.notes.items() for note in notes]


def table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: int,
    said: Collection[int] = (),
    mark: int | None = None,
) -> str:
    """An HTML table of plain texts.

    Args:
        text: the first ``text`` columns are to the left.
        said: columns of long texts, whose words may be broken.
        mark: a cell of this column that ends with "worse" stands out.
    """

    def kind(i: int, value: str) -> str:
        if i == mark and value.endswith("worse"):
            return ' class="worse"'
        return ' class="said"' if i in said else ' class="text"' if i < text else ""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind(i, value)}>{escape(value)}</{tag}>" for i, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", names)}</tr>\n{body}</table></div>'


def _perplexity(summary: Summary) -> list[str]:
    if not summary.perplexity:
        return []
    rows = [[name, f"{value:.4g}"] for name, value in summary.perplexity.items()]
    return ["<h2>Perplexity of the text</h2>", table(["variant", "perplexity"], rows, text=1)]


def _outputs(records: Sequence[Record]) -> list[str]:
    """Raw answers, those first where a variant is worse than dense by the most."""
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        if "outputs" in record:
            cases.setdefault(record["case"], {})[record["variant"]] = record
    worst = {case: min(one["score"] - of[DENSE]["score"] for one in of.values()) for case, of in cases.items()}
    chosen = sorted(cases, key=lambda case: worst[case])[:SHOWN]
    rows = []
    for case in chosen:
        for name, record in cases[case].items():
            asked_and_said = zip(record["questions"], record["expected"], record["outputs"], strict=True)
            for asked, expected, said in list(asked_and_said)[:SHOWN]:
                words = (_tail(asked), _head(", ".join(expected)), _head(said))
                rows.append([case, name, *words, f"{record['score']:.2f}"])
    said = (
        f"{len(chosen)} of {len(cases)} prompts, where variants lose the most to dense first, and of each at most "
        f"{SHOWN} questions. All are in the records."
    )
    names = ["prompt", "variant", "question", "expected", "answer", "score of the prompt"]
    return [f"<p>{said}</p>", table(names, rows, text=5, said=(2, 3, 4))]


def _head(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} ..."


def _tail(text: str) -> str:
    return text if len(text) <= CUT else f"... {text[-CUT:]}"


def _json(data: Any) -> str:
    return f"<pre>{escape(json.dumps(data, indent=1))}</pre>"
