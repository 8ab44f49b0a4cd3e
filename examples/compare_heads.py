"""Which order of the heads is best? ``python compare_heads.py measure MODEL --maps FOLDER --out curves.jsonl``.

``hf-longctx identify MODEL --method WORD --out FOLDER/WORD.yaml`` makes the orders: each YAML in the folder ranks the
KV heads by its scores. Random orders are added. The best 10 %, 20 % ... 90 % of the heads become retrieval heads, the
rest streams as the YAML says, and every question's expected answer is scored (teacher forcing): its likelihood, and
whether all its tokens are the greedy choice. A run goes on where it stopped, and does more when it is asked for more.

``python compare_heads.py table curves.jsonl`` prints what was found, ``--plot curves.png`` draws it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxConfig, patched
from hf_longctx.assets import embedded
from hf_longctx.evaluate.measures import paired_bootstrap
from hf_longctx.io.plots import new_figure
from hf_longctx.io.plots import save as save_figure
from hf_longctx.io.progress import Progress
from hf_longctx.planning.sizes import parse_tokens
from hf_longctx.tasks import task_from
from hf_longctx.tasks.base import Sample
from hf_longctx.tasks.forced import forced_answers
from hf_longctx.tasks.haystack import is_tiny_language
from hf_longctx.tasks.language import language_for

SHARES = [round(0.1 * i, 1) for i in range(1, 10)]
RANDOM_ORDERS = 5
DENSE = "dense"
RANDOM = "random "
TASKS = ("needle:variant=multi_key:needles=8:questions=8", "facts:facts=8")
KEY = ("tokens", "task", "seed", "order", "share", "dense_tail", "together")
ANSWERABLE = 0.6  # exact match of the dense model, below which a cell tells orders of heads apart by chance


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
    made: tuple = ()
    with args.out.open("a") as file, Progress("curves", len(todo), "measurements") as bar:
        for cell in todo:
            text = cell["task"], cell["tokens"], cell["seed"]
            if not made or made[0] != text:
                sample = task_from(cell["task"]).make(language, cell["tokens"], seed=cell["seed"])
                made = text, sample
            if cell["order"] == DENSE:
                found = answered(model, made[1], args.together)
            else:
                with patched(model, orders.config(cell["order"], cell["share"], cell["dense_tail"])):
                    found = answered(model, made[1], args.together)
            file.write(json.dumps(cell | found) + "\n")
            file.flush()
            bar.advance(saved=True)


def rows(path: Path) -> Iterator[dict]:
    yield from map(json.loads, path.read_text().splitlines())


class Cell:
    """Everything that was measured of one task at one length."""

    def __init__(self, found: list[dict]):
        self.of: dict[tuple, dict[int, dict]] = defaultdict(dict)
        for row in found:
            self.of[row["order"], row["share"], row["dense_tail"]][row["seed"]] = row
        curves = [set(texts) for (_, _, tail), texts in self.of.items() if not tail]
        self.everywhere = set.intersection(*curves) if curves else set()

    def values(self, name: str, order: str, share: float, tail: int = 0, seeds: set[int] | None = None) -> list[float]:
        """One number per question, of the contexts ``seeds`` (None: all)."""
        found = self.of[order, share, tail]
        return [float(x) for seed in sorted(found) if seeds is None or seed in seeds for x in found[seed][name]]

    def mean(self, name: str, order: str, share: float = 1.0, tail: int = 0) -> float:
        return float(np.mean(self.values(name, order, share, tail)))

    def orders(self) -> list[str]:
        return list(dict.fromkeys(order for order, _, tail in self.of if order != DENSE))

    def chance(self) -> list[str]:
        return [order for order in self.orders() if order.startswith(RANDOM)]

    def ranked(self) -> list[str]:
        """The orders that are not random, the least NLL under the curve first."""
        named = [order for order in self.orders() if not order.startswith(RANDOM)]
        return sorted(named, key=lambda order: np.inf if (area := self.area("nll", order)) is None else area)

    def shares(self, order: str, tail: int = 0) -> list[float]:
        return sorted(share for one, share, t in self.of if (one, t) == (order, tail))

    def area(self, name: str, order: str) -> float | None:
        """Under the curve, as a mean height over its shares, on the texts that everything was measured on.

        None: there are no such texts, or fewer than two shares.
        """
        shares = self.shares(order)
        if len(shares) < 2 or not self.everywhere:
            return None
        heights = [np.mean(self.values(name, order, share, seeds=self.everywhere)) for share in shares]
        return float(np.trapezoid(heights, shares) / (shares[-1] - shares[0]))

    def lost(self, order: str, share: float, tail: int = 0) -> str:
        """NLL above dense, with its interval of 95 %."""
        seeds = set(self.of[order, share, tail])
        own = self.values("nll", order, share, tail)
        found = paired_bootstrap(self.values("nll", DENSE, 1.0, seeds=seeds), own)
        if found.low is None:
            return f"{found.difference:+.3f}"
        return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def by_cell(paths: list[Path]) -> dict[tuple, Cell]:
    """What was measured, by (tokens, task, together)."""
    found = defaultdict(list)
    for row in itertools.chain.from_iterable(map(rows, paths)):
        found[row["tokens"], row["task"], row["together"]].append(row)
    return {key: Cell(found[key]) for key in sorted(found)}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(cell: Cell, share: float) -> list[str]:
    """Every order, the least NLL under its curve first, and the random ones together."""
    lines = [
        ("order", "area NLL", "area right", f"NLL to dense at {share:.0%}", "right"),
        ("dense", number(cell.mean("nll", DENSE)), number(cell.mean("right", DENSE)), "", ""),
    ]
    for order in cell.ranked():
        at = ("-", "-")
        if share in cell.shares(order):
            at = (cell.lost(order, share), number(cell.mean("right", order, share)))
        lines.append((order, *(number(cell.area(name, order)) for name in ("nll", "right")), *at))
    if cell.chance():
        areas = [
            [a for order in cell.chance() if (a := cell.area(name, order)) is not None] for name in ("nll", "right")
        ]
        best = [number(choose(found, default=None)) for choose, found in zip((min, max), areas, strict=True)]
        at = [cell.lost(order, share) for order in cell.chance() if share in cell.shares(order)]
        lines.append((f"best of {len(cell.chance())} random", *best, least(at), ""))
    return markdown(lines)


def least(said: list[str]) -> str:
    return min(said, key=lambda one: float(one.split()[0]), default="-")


def by_share(cell: Cell) -> list[str]:
    """NLL at every share, on the texts that everything was measured on."""
    shares = sorted({share for order in cell.orders() for share in cell.shares(order)})

    def at(order: str, share: float) -> float | None:
        found = cell.values("nll", order, share, seeds=cell.everywhere)
        return float(np.mean(found)) if found else None

    lines = [("order", *(f"{share:.0%}" for share in shares))]
    lines.append((DENSE, *[number(at(DENSE, 1.0))] * len(shares)))
    lines += [(order, *(number(at(order, share)) for share in shares)) for order in cell.ranked()]
    if cell.chance():
        best = [[x for order in cell.chance() if (x := at(order, share)) is not None] for share in shares]
        lines.append((f"best of {len(cell.chance())} random", *(number(min(found, default=None)) for found in best)))
    return markdown(lines)


def markdown(lines: list[tuple[str, ...]]) -> list[str]:
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(f"{one:{w}}" for one, w in zip(line, wide, strict=True)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *text[1:]]


def show(args: argparse.Namespace) -> None:
    cells = by_cell(args.files)
    for (tokens, task, together), cell in cells.items():
        dense = cell.values("nll", DENSE, 1.0)
        curve = len(cell.values("nll", DENSE, 1.0, seeds=cell.everywhere))
        asked = "in one forward with the context" if together else "of copies of the context's cache"
        sys.stdout.write(f"\n{task}, {tokens} tokens, {len(dense)} questions {asked}; areas: {curve}\n\n")
        if cell.mean("right", DENSE) < ANSWERABLE:
            sys.stdout.write(f"Dense answers less than {ANSWERABLE:.0%} of them: what is right ranks nothing.\n\n")
        sys.stdout.write("\n".join(table(cell, args.share)) + "\n")
        if any(len(cell.shares(order)) > 1 for order in cell.orders()):
            sys.stdout.write("\n" + "\n".join(by_share(cell)) + "\n")
        for tail in sorted({t for _, _, t in cell.of} - {0}):
            sys.stdout.write("\n".join(tails(cell, tail)) + "\n")
    if args.plot:
        save_figure(curves(cells), args.plot)


def tails(cell: Cell, tail: int) -> list[str]:
    """NLL above dense with the last ``tail`` tokens of a prompt read densely."""
    found = [(order, share) for order, share, t in cell.of if t == tail]
    return [f"dense_tail {tail}: {order} at {share:.0%} {cell.lost(order, share, tail)}" for order, share in found]


def curves(cells: dict[tuple, Cell]):
    """NLL by share of retrieval heads, one plot per task and length."""
    across = min(2, len(cells))
    down = -(-len(cells) // across)
    figure = new_figure(5.2 * across, 3.4 * down)
    axes = figure.subplots(down, across, squeeze=False)
    for place, ((tokens, task, _), cell) in zip(axes.flat, cells.items(), strict=False):
        place.set_title(f"{task.partition(':')[0]}, {tokens} tokens", fontsize=9)
        chance = cell.chance()
        for order in cell.orders():
            shares = cell.shares(order)
            grey = order in chance
            look = {"color": "0.75", "linewidth": 0.9} if grey else {"marker": ".", "linewidth": 1.3}
            label = None if grey and order != chance[0] else "random" if grey else order
            place.plot(shares, [cell.mean("nll", order, share) for share in shares], label=label, **look)
        place.axhline(cell.mean("nll", DENSE), color="black", linestyle="--", linewidth=0.9, label="dense")
        place.set_yscale("log")
        place.set_xlabel("share of retrieval heads")
        place.set_ylabel("NLL per token")
        place.grid(alpha=0.3, linewidth=0.5)
    axes.flat[0].legend(fontsize=7)
    for place in axes.flat[len(cells) :]:
        place.set_axis_off()
    return figure


def tokens(text: str) -> int:
    return parse_tokens(text, "--tokens")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="measure the orders of a folder")
    one.add_argument("model", help="hub id, folder, or a name of ours")
    one.add_argument("--maps", type=Path, required=True, help="folder of the YAMLs that hf-longctx identify wrote")
    one.add_argument("--out", type=Path, required=True, help="a .jsonl, one line per text, order and share")
    one.add_argument("--tokens", type=tokens, nargs="+", default=[2048])
    one.add_argument("--tasks", nargs="+", default=TASKS)
    one.add_argument("--contexts", type=int, default=6, help="texts of each task and length")
    one.add_argument("--shares", type=float, nargs="+", default=SHARES)
    one.add_argument("--orders", nargs="+", help="some of the orders; default: all files and the random ones")
    one.add_argument("--random", type=int, default=RANDOM_ORDERS, help="random orders")
    one.add_argument("--dense-tail", type=int, nargs="+", default=[0])
    one.add_argument("--together", action="store_true", help="context and question in one forward")
    one.add_argument("--haystack", default="book")
    one.add_argument("--dtype", default="auto")
    one.set_defaults(run=measure)
    two = commands.add_parser("table", help="print what was measured")
    two.add_argument("files", type=Path, nargs="+")
    two.add_argument("--share", type=float, default=0.5, help="the share that is compared with dense")
    two.add_argument("--plot", type=Path)
    two.set_defaults(run=show)
    args = parser.parse_args(given)
    args.run(args)


if __name__ == "__main__":
    main()
