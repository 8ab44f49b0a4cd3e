"""Eviction here beside kvpress: the same model, prompts and process; what answers cost in quality, bytes and time.

    python examples/eviction_beside_kvpress.py hf-longctx/smollm2-135m-instruct --tokens 2048 --haystack book --chat \
        --rows dense,kvpress,ours --out beside.jsonl

kvpress asks for a Transformers version of its own, so it needs an environment of its own: pip install kvpress==0.5.5
transformers==5.1.0, and this package with --no-deps. Questions are asked in two ways: inside of the prompt that is
compressed, and after it, as the second turn of a chat. ``--costs`` measures bytes and times instead, ``--check`` what
happens in padded batches, assisted decoding and second turns. Lines that are in ``--out`` already are not measured
again, unless they were refused; without ``--rows`` its tables are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kvpress_checks import CHECKS, check
from kvpress_rows import DENSE, HALVES, OURS, THEIRS, Row, measured, read_alike, rows_from, tables
from kvpress_sides import Stock, costs, ours, theirs

from hf_longctx.assets import embedded
from hf_longctx.commands._options import load_model
from hf_longctx.errors import ConfigError
from hf_longctx.evaluate.plan import Case
from hf_longctx.io.json_lines import json_lines
from hf_longctx.tasks import tasks_from
from hf_longctx.tasks.base import Sample
from hf_longctx.tasks.language import language_for

TASKS = "needle:variant=multi_key:needles=8:questions=8,facts:facts=8:questions=8,passkey"


def main() -> None:
    options = arguments()
    rows = rows_from(options.rows, options.budgets) if options.rows else []
    kvpress = kvpress_for(rows)  # before anything is patched: it wraps every attention function
    if rows:
        model, tokenizer = load_model(embedded(options.model), options.dtype, torch.device("cpu"))
        language = language_for(tokenizer, options.haystack, None, options.chat)
        with torch.no_grad():
            if options.check:
                for row in rows:
                    found = check(options.check, model, kvpress, options.config, row, language, options.tokens[0])
                    sys.stdout.write(f"{row}: {found}\n")
                return
            measure(options, rows, (model, tokenizer), kvpress, language)
    for line in tables([line for _, line in json_lines(options.out, "--out")]):
        sys.stdout.write(line + "\n")


def kvpress_for(rows: list[Row]) -> Any:
    if not any(row.side == THEIRS for row in rows):
        return None
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as error:
        raise ConfigError(f"rows: kvpress cannot be imported here ({error}). See the head of this file.") from None
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns each time that it is slow
    return kvpress


def measure(options: argparse.Namespace, rows: list[Row], loaded: tuple[Any, Any], kvpress: Any, language: Any) -> None:
    done = measured([line for _, line in json_lines(options.out, "--out")]) if options.out.exists() else set()
    for tokens in options.tokens:
        for name, sample in contexts(options, language, tokens):
            if options.costs:
                found = costs_of(options, rows, loaded, kvpress, sample, tokens, done)
            else:
                found = answers_of(options, rows, loaded, kvpress, sample, tokens, name, done)
            for line in found:
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                sys.stderr.write(f"{line['key']}{': ' + line['refused'] if 'refused' in line else ''}\n")
            if options.costs:
                break


def contexts(options: argparse.Namespace, language: Any, tokens: int) -> Iterator[tuple[str, Sample]]:
    """(name, sample); a task with one question per context has as many contexts as others have questions."""
    for task in tasks_from(options.tasks):
        for number in range(options.samples * options.questions):
            sample = Case(task, tokens, None, number, options.seed).sample(language)
            if len(sample.questions) > 1 and number >= options.samples:
                break
            yield f"{task.name} {number}", sample


def answers_of(
    options: argparse.Namespace,
    rows: list[Row],
    loaded: tuple[Any, Any],
    kvpress: Any,
    sample: Sample,
    tokens: int,
    name: str,
    done: set[str],
) -> Iterator[dict]:
    model, tokenizer = loaded

    def key(row: Row, where: str) -> str:
        return f"{tokens} | {name} | {row} | {where}"

    left = [row for row in rows if not done.issuperset(key(row, where) for where in HALVES)]
    stock = [row for row in left if row.side in (DENSE, THEIRS)]
    found = [theirs(Stock(model, kvpress), stock, sample, options.questions)] if stock else []
    groups = read_alike([row for row in left if row.side == OURS])
    found += [ours(model, tokenizer, options.config, group, sample, options.questions) for group in groups]
    for row, where, result in (one for some in found for one in some):
        if key(row, where) not in done:
            head = {"key": key(row, where), "kind": "answers", "row": row.label, "budget": row.budget}
            yield {**head, "tokens": tokens, "case": name, "where": where, **result}


def costs_of(
    options: argparse.Namespace,
    rows: list[Row],
    loaded: tuple[Any, Any],
    kvpress: Any,
    sample: Sample,
    tokens: int,
    done: set[str],
) -> Iterator[dict]:
    ids = torch.cat([torch.as_tensor(one) for one in (sample.context, sample.questions[0].prompt)])
    for row in rows:
        key = f"{tokens} | costs | {row}"
        if key not in done:
            head = {"key": key, "kind": "costs", "row": row.label, "budget": row.budget, "tokens": tokens}
            yield {**head, **costs(*loaded, kvpress, options.config, row, ids, options.steps)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--config", default="smollm2-135m-instruct")
    parser.add_argument("--rows", help="dense, kvpress, ours, kvpress/PRESS@SHARE, ours/WORD:field=value@SHARE, ...")
    parser.add_argument("--budgets", type=numbers(float), default=[0.5, 0.3, 0.2, 0.1], help="of rows that name none")
    parser.add_argument("--tokens", type=numbers(int), default=[2048])
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--samples", type=int, default=1, help="contexts of each task")
    parser.add_argument("--questions", type=int, default=8, help="about a context at most")
    parser.add_argument("--haystack", help="sentences, book, noise")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--costs", action="store_true", help="instead: bytes and times, of the first prompt")
    parser.add_argument("--steps", type=int, default=16, help="decoded tokens that are timed")
    parser.add_argument("--check", choices=tuple(CHECKS), help="instead: print what happens there")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("beside_kvpress.jsonl"))
    return parser.parse_args()


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
