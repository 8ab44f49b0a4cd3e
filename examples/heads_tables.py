"""What ``compare_heads.py`` measured, as Markdown tables and a picture: ``python heads_tables.py curves.jsonl ...``."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf_longctx.evaluate.measures import paired_bootstrap
from hf_longctx.io.plots import new_figure, save

DENSE = "dense"
RANDOM = "random "
ANSWERABLE = 0.6  # exact match of the dense model, below which what is right tells orders of heads apart by chance


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

    def at(self, name: str, order: str, share: float) -> float | None:
        """A mean on the texts that everything was measured on, so that all points of all curves are of the same."""
        found = self.values(name, order, share, seeds=self.everywhere)
        return float(np.mean(found)) if found else None

    def area(self, name: str, order: str) -> float | None:
        """Under the curve, as a mean height over its shares, on the texts that everything was measured on.

        None: there are no such texts, or fewer than two shares.
        """
        shares = self.shares(order)
        if len(shares) < 2 or not self.everywhere:
            return None
        heights = [self.at(name, order, share) for share in shares]
        return float(np.trapezoid(heights, shares) / (shares[-1] - shares[0]))

    def lost(self, order: str, share: float, tail: int = 0) -> str:
        """NLL above dense, with its interval of 95 %."""
        seeds = set(self.of[order, share, tail])
        own = self.values("nll", order, share, tail)
        found = paired_bootstrap(self.values("nll", DENSE, 1.0, seeds=seeds), own)
        if found.low is None:
            return f"{found.difference:+.3f}"
        return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def by_cell(paths: list[Path], orders: list[str] | None = None) -> dict[tuple, Cell]:
    """What was measured, by (tokens, task, together)."""
    found = defaultdict(list)
    for row in itertools.chain.from_iterable(map(rows, paths)):
        if orders is None or row["order"] in (DENSE, *orders) or row["order"].startswith(RANDOM):
            found[row["tokens"], row["task"], row["together"]].append(row)
    return {key: Cell(found[key]) for key in sorted(found)}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(cell: Cell, share: float) -> list[str]:
    """Every order, the least NLL under its curve first, and the random ones together."""
    areas = [number(cell.at(name, DENSE, 1.0)) for name in ("nll", "right")]
    lines = [
        ("order", "area NLL", "area right", f"NLL to dense at {share:.0%}", "right"),
        (DENSE, *areas, number(cell.mean("nll", DENSE)) + " itself", number(cell.mean("right", DENSE))),
    ]
    for order in cell.ranked():
        at = ("-", "-")
        if share in cell.shares(order):
            at = (cell.lost(order, share), number(cell.mean("right", order, share)))
        lines.append((order, *(number(cell.area(name, order)) for name in ("nll", "right")), *at))
    if cell.chance():
        found = [[a for one in cell.chance() if (a := cell.area(name, one)) is not None] for name in ("nll", "right")]
        best = [number(choose(own, default=None)) for choose, own in zip((min, max), found, strict=True)]
        at = [cell.lost(order, share) for order in cell.chance() if share in cell.shares(order)]
        lines.append((f"best of {len(cell.chance())} random", *best, least(at), ""))
    return markdown(lines)


def least(said: list[str]) -> str:
    return min(said, key=lambda one: float(one.split()[0]), default="-")


def by_share(cell: Cell) -> list[str]:
    """NLL at every share."""
    shares = sorted({share for order in cell.orders() for share in cell.shares(order)})
    lines = [("order", *(f"{share:.0%}" for share in shares))]
    lines.append((DENSE, *[number(cell.at("nll", DENSE, 1.0))] * len(shares)))
    lines += [(order, *(number(cell.at("nll", order, share)) for share in shares)) for order in cell.ranked()]
    if cell.chance():
        best = [[x for order in cell.chance() if (x := cell.at("nll", order, share)) is not None] for share in shares]
        lines.append((f"best of {len(cell.chance())} random", *(number(min(found, default=None)) for found in best)))
    return markdown(lines)


def markdown(lines: list[tuple[str, ...]]) -> list[str]:
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(f"{one:{w}}" for one, w in zip(line, wide, strict=True)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *text[1:]]


def show(args: argparse.Namespace) -> None:
    cells = by_cell(args.files, args.orders)
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
        save(curves(cells), args.plot)


def tails(cell: Cell, tail: int) -> list[str]:
    """NLL above dense with the last ``tail`` tokens of a prompt read densely."""
    found = [(order, share) for order, share, t in cell.of if t == tail]
    return [f"dense_tail {tail}: {order} at {share:.0%} {cell.lost(order, share, tail)}" for order, share in found]


def curves(cells: dict[tuple, Cell]):
    """NLL by share of retrieval heads, one plot per task and length."""
    from matplotlib.ticker import ScalarFormatter

    figure = new_figure(4.2 * len(cells), 4.2)
    named = sorted({order for cell in cells.values() for order in cell.ranked()})
    for place, ((tokens, task, _), cell) in zip(
        figure.subplots(1, len(cells), squeeze=False).flat, cells.items(), strict=True
    ):
        place.set_title(f"{task.partition(':')[0]}, {tokens} tokens", fontsize=9)
        chance = cell.chance()
        for order in [*chance, *cell.ranked()]:
            number = 0 if order in chance else named.index(order)
            shares = [share for share in cell.shares(order) if cell.at("nll", order, share) is not None]
            look = {"color": f"C{number % 10}", "marker": "osv^D"[number % 5], "markersize": 3.5, "linewidth": 1.2}
            if order in chance:
                look = {"color": "0.75", "linewidth": 0.9}
            label = order if order not in chance else "random" if order == chance[0] else None
            place.plot(shares, [cell.at("nll", order, share) for share in shares], label=label, **look)
        place.axhline(cell.at("nll", DENSE, 1.0) or np.nan, color="black", linestyle="--", linewidth=0.9, label="dense")
        place.set_yscale("log")
        for axis in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            axis(ScalarFormatter())
        place.tick_params(labelsize=7, which="both")
        place.set_xlabel("share of retrieval heads", fontsize=9)
        place.set_ylabel("NLL, nats per token", fontsize=9)
        place.grid(alpha=0.3, linewidth=0.5)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--orders", nargs="+", help="some of the orders; the random ones are always shown")
    parser.add_argument("--share", type=float, default=0.5, help="the share that is compared with dense")
    parser.add_argument("--plot", type=Path)
    show(parser.parse_args(given))


if __name__ == "__main__":
    main()
