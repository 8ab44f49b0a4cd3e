"""Which order of the heads is best? ``python compare_heads.py MODEL --maps FOLDER --out curves.jsonl``.

``hf-longctx identify MODEL --method WORD --out FOLDER/WORD.yaml`` makes the orders: each YAML in the folder ranks the
KV heads by its scores. Random orders are added. The best 10 %, 20 % ... 90 % of the heads become retrieval heads, the
rest streams as the YAML says, and every question's expected answer is scored (teacher forcing): its likelihood, and
whether all its tokens are the greedy choice. A run goes on where it stopped, and does more when it is asked for more.

``heads_tables.py`` prints and draws what was found.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from heads_tables import DENSE, RANDOM, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxConfig, patched
from hf_longctx.assets import embedded
from hf_longctx.io.progress import Progress
from hf_longctx.planning.sizes import parse_tokens
from hf_longctx.tasks import task_from
from hf_longctx.tasks.base import Sample
from hf_longctx.tasks.forced import forced_answers
from hf_longctx.tasks.haystack import is_tiny_language
from hf_longctx.tasks.language import language_for

SHARES = [round(0.1 * i, 1) for i in range(1, 10)]
RANDOM_ORDERS = 5
TASKS = ("needle:variant=multi_key:needles=8:questions=8", "facts:facts=8")
KEY = ("tokens", "task", "seed", "order", "share", "dense_tail", "together")


@dataclass(frozen=True)
class Orders:
    """Scores by name, and the config that all of them are put into: it says what streaming heads keep."""

    base: LongCtxConfig
    scores: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path, random: int = RANDOM_ORDERS) -> Orders:
        files = sorted(folder.glob("*.yaml"))
        if not files:
            raise SystemExit(f"--maps: {folder} holds no .yaml; hf-longctx identify writes them.")
        configs = {file.stem: LongCtxConfig.from_yaml(file) for file in files}
        base = next(iter(configs.values()))
        if any(config.stores != base.stores for config in configs.values()):
            raise SystemExit(f"--maps: the files in {folder} keep different tokens (sink, recent); give them the same.")
        scores = {name: np.array(config.scores) for name, config in configs.items()}
        shape = next(iter(scores.values())).shape
        scores |= {f"{RANDOM}{seed}": np.random.default_rng(seed).random(shape) for seed in range(random)}
        return cls(base, scores)

    def config(self, order: str, share: float, dense_tail: int) -> LongCtxConfig:
        """The best ``share`` of an order are retrieval heads; equal scores in the order of the heads."""
        scores = self.scores[order]
        best = np.argsort(-scores.ravel(), kind="stable")[: int(share * scores.size + 0.5)]
        letters = np.full(scores.size, "S")
        letters[best] = "R"
        roles = ["".join(row) for row in letters.reshape(scores.shape)]
        given = {
            "model": self.base.to_dict()["model"],
            "heads": {"roles": roles},
            "stores": self.base.to_dict()["stores"],
            "prefill": {"streaming": {"pattern": "sink_recent", "dense_tail": dense_tail}},
        }
        return LongCtxConfig.from_dict(given)


def answered(model, sample: Sample, together: bool) -> dict[str, list]:
    found = forced_answers(model, sample, together=together)
    return {
        "nll": [round(one.nll / one.tokens, 5) for one in found],
        "right": [one.right for one in found],
    }


def cells(args: argparse.Namespace, orders: Orders) -> Iterator[dict]:
    """What is to be measured, in an order in which a run that stops early has something of everything."""
    asked = args.orders or list(orders.scores)
    for seed, tokens, task in itertools.product(range(args.contexts), args.tokens, args.tasks):
        cell = {"tokens": tokens, "task": task, "seed": seed}
        yield {**cell, "order": DENSE, "share": 1.0, "dense_tail": 0, "together": args.together}
        for share, order, tail in itertools.product(args.shares, asked, args.dense_tail):
            yield {**cell, "order": order, "share": share, "dense_tail": tail, "together": args.together}


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def measure(args: argparse.Namespace) -> None:
    orders = Orders.read(args.maps, args.random)
    folder = embedded(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).eval()
    tiny = is_tiny_language(tokenizer)
    said = {} if tiny else {"haystack": args.haystack, "chat": bool(tokenizer.chat_template)}
    language = language_for(tokenizer, **said)
    done = {key_of(row) for row in rows(args.out)} if args.out.exists() else set()
    todo = [cell for cell in cells(args, orders) if key_of(cell) not in done]

    @functools.lru_cache(1)
    def sample(task: str, tokens: int, seed: int) -> Sample:
        return task_from(task).make(language, tokens, seed=seed)

    with args.out.open("a") as file, Progress("curves", len(todo), "measurements") as bar:
        for cell in todo:
            dense = cell["order"] == DENSE
            config = None if dense else orders.config(cell["order"], cell["share"], cell["dense_tail"])
            with nullcontext() if dense else patched(model, config):
                found = answered(model, sample(cell["task"], cell["tokens"], cell["seed"]), args.together)
            file.write(json.dumps(cell | found) + "\n")
            file.flush()
            bar.advance(saved=True)


def tokens(text: str) -> int:
    return parse_tokens(text, "--tokens")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder, or a name of ours")
    parser.add_argument("--maps", type=Path, required=True, help="folder of the YAMLs that hf-longctx identify wrote")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl, one line per text, order and share")
    parser.add_argument("--tokens", type=tokens, nargs="+", default=[2048])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--contexts", type=int, default=6, help="texts of each task and length")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--orders", nargs="+", help="some of the orders; default: all files and the random ones")
    parser.add_argument("--random", type=int, default=RANDOM_ORDERS, help="random orders")
    parser.add_argument("--dense-tail", type=int, nargs="+", default=[0])
    parser.add_argument("--together", action="store_true", help="context and question in one forward")
    parser.add_argument("--haystack", default="book")
    parser.add_argument("--dtype", default="auto")
    measure(parser.parse_args(given))


if __name__ == "__main__":
    main()
