"""Do the identification methods find the heads that matter? ``python compare_methods.py --out results.json``.

For every embedded model each method ranks the KV heads; the best 10 %, 20 % ... 100 % of them become retrieval heads
and the rest streams. What counts is the area under the curve of exact match against that share. The references are the
order found by ablation (the shipped config) and random orders. Goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ablate import RECENT, SINK, measure, texts, with_roles
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxConfig, identify
from hf_longctx.assets import asset, assets
from hf_longctx.config.config import load_shipped

SHARES = [round(0.1 * i, 1) for i in range(1, 11)]
RANDOM_ORDERS = 5
OPTIONS = {
    "echo_induction": {},
    "two_needle": {},
    "retrieval_score": {},
    "duo_gates": {"steps": 100, "length": 1024, "gradient_checkpointing": False},
    "query_focused": {},
    "kvzip": {},
    "mean_rank": {},
}


class Curves:
    """Exact match by share of retrieval heads, for one order of the heads after another; roles are measured once."""

    def __init__(self, model, length: int, rows: int, notes: int):
        self.model, self.known = model, {}
        self.judge = texts(3, rows, length, notes)
        self.shape = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.dense = measure(model, *self.judge)[1]

    def of(self, scores: np.ndarray) -> list[float]:
        """Exact match at every share, best scores first; equal scores in the order of the heads, as in a config."""
        order = np.argsort(-scores.ravel(), kind="stable")
        return [self._exact(order[: int(share * scores.size + 0.5)]) for share in SHARES]

    def _exact(self, retrieval: np.ndarray) -> float:
        key = frozenset(retrieval.tolist())
        if key not in self.known:
            letters = np.full(self.shape, "S")
            letters.ravel()[list(key)] = "R"
            self.known[key] = with_roles(self.model, letters.tolist(), *self.judge)[1]
        return self.known[key]


def area(curve: list[float]) -> float:
    """Under the curve from the first share to the last, as a mean height."""
    return float(np.trapezoid(curve, SHARES) / (SHARES[-1] - SHARES[0]))


def row(curve: list[float], seconds: float | None = None) -> dict:
    return {"area": round(area(curve), 4), "curve": [round(y, 4) for y in curve], "seconds": seconds}


def compare(name: str, length: int, rows: int, notes: int, found: dict, save: Callable[[], object]) -> None:
    """Fill ``found`` with what it lacks, and call ``save`` after every order that was measured."""
    model = AutoModelForCausalLM.from_pretrained(asset(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(asset(name))
    curves = Curves(model, length, rows, notes)
    found["dense"] = round(curves.dense, 4)
    ablation = load_shipped(name)
    if "ablation" not in found:
        found["ablation"] = row(curves.of(np.array(ablation.heads.scores)))
        save()
    for method, options in OPTIONS.items():
        if method in found:
            continue
        started = time.perf_counter()
        config: LongCtxConfig = identify(model, tokenizer, method, sink=SINK, recent=RECENT, **options)
        seconds = round(time.perf_counter() - started, 1)
        found[method] = row(curves.of(np.array(config.heads.scores)), seconds)
        found[method] |= {"options": options, "confidence": config.heads.confidence}
        save()
    for seed in range(RANDOM_ORDERS):
        if f"random {seed}" not in found:
            found[f"random {seed}"] = row(curves.of(np.random.default_rng(seed).random(curves.shape)))
            save()


def table(results: dict) -> str:
    """The areas as a Markdown table."""
    lines = ["| order of the heads | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in ("ablation", *OPTIONS):
        cells = []
        for found in results.values():
            seconds = "" if found[name]["seconds"] is None else f" ({found[name]['seconds']:.0f} s)"
            cells.append(f"{found[name]['area']:.3f}{seconds}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = []
    for found in results.values():
        areas = [found[f"random {seed}"]["area"] for seed in range(RANDOM_ORDERS)]
        cells.append(f"{np.mean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})")
    return "\n".join([*lines, f"| random, {RANDOM_ORDERS} orders | " + " | ".join(cells) + " |"])


def write(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=assets())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--notes", type=int, default=16)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {"length": args.length, "questions": args.rows * args.notes, "torch": torch.__version__}
    if results.setdefault("about", about) != about:
        parser.error(f"{args.out} was measured with {results['about']}; give another --out.")
    for name in args.models:
        found = results.setdefault(name, {})
        save = functools.partial(write, args.out, results)
        compare(name, args.length, args.rows, args.notes, found, save)
    sys.stdout.write(table({name: found for name, found in results.items() if name != "about"}) + "\n")


if __name__ == "__main__":
    main()
