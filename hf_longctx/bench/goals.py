"""The goals of this version, stated for the default sizes, and how far the figures are from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .block_lists import name_of
from .columns import HALF, RETRIEVAL, STOCK, STREAMING
from .settings import Settings

LONG = 32768  # tokens the goals of decode are stated for
FASTER = {"fp32": 3.0, "bf16": 6.0}  # decode, all retrieval against stock
PURE = 1.7  # decode, half streaming against all retrieval
SHARE = {"fp32": 0.22, "bf16": 0.18}  # decode, speed of reading as a share of the speed of summing
PREFILL = {8192: 7.0, LONG: 20.0}  # streaming heads against dense
LISTS = 0.65  # prefill in float32, block lists against dense, as a share of 1 / density
WHOLE = 1.05  # whole model, time against stock


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured, in the unit of the goal.

    Attributes:
        unit: "x" for how many times faster, "%" for a share of what is possible, "% of ..." for any other share.
        at_most: the goal is an upper bound.
    """

    text: str
    goal: float
    measured: float
    unit: str = "x"
    at_most: bool = False

    @property
    def possible(self) -> bool:
        """Nothing reads faster than the sum does: a higher share means that the machine was busy elsewhere."""
        return self.unit != "%" or self.measured <= 100

    @property
    def reached(self) -> bool:
        if not self.possible:
            return False
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal

    def verdict(self) -> str:
        """``reached`` with the figure, ``short by`` how much, or why it means nothing."""
        digits = 2 if self.unit == "x" else 1
        measured, goal = (f"{number:.{digits}f}{self.unit}" for number in (self.measured, self.goal))
        if not self.possible:
            return f"not measured: {measured} is impossible, the machine was busy with something else (goal {goal})"
        if self.reached:
            return f"reached: {measured} ({'at most' if self.at_most else 'goal'} {goal})"
        return f"short by {abs(self.goal - self.measured):.{digits}f}{self.unit[0]}: {measured} (goal {goal})"

    def as_dict(self) -> dict:
        return {**asdict(self), "reached": self.reached, "verdict": self.verdict()}


def goals(benchmark: str, settings: Settings, results: list[dict]) -> list[Goal]:
    """The goals that these results speak to; none where the shape is not the default one."""
    if not settings.default_shape:
        return []
    make = {"decode": _decode, "prefill": _prefill, "e2e": _whole}[benchmark]
    return [goal for result in results for goal in make(result)]


def _decode(result: dict) -> Iterator[Goal]:
    word, tokens, columns = result["dtype"], result["tokens"], result["columns"]
    if tokens != LONG:
        return
    ms = {name: column["ms_per_layer"]["median_ms"] for name, column in columns.items()}
    where = f"decode {word} at {tokens}"
    yield Goal(f"{where}: {RETRIEVAL} faster than stock", FASTER[word], ms[STOCK] / ms[RETRIEVAL])
    yield Goal(f"{where}: {HALF} faster than {RETRIEVAL}", PURE, ms[RETRIEVAL] / ms[HALF])
    for name in (RETRIEVAL, HALF):
        share = 100 * columns[name]["share_of_sum"]
        yield Goal(f"{where}: {name} reads at a share of the summing speed", 100 * SHARE[word], share, "%")


def _prefill(result: dict) -> Iterator[Goal]:
    if result["tokens"] in PREFILL:
        ms = {name: column["ms"]["median_ms"] for name, column in result["columns"].items()}
        text = f"prefill {result['dtype']} at {result['tokens']}: streaming heads faster than stock's dense"
        yield Goal(text, PREFILL[result["tokens"]], ms[STOCK] / ms[STREAMING])
    if result["tokens"] in PREFILL and result["dtype"] == "fp32":
        for name in map(name_of, Settings.densities):
            if name in ms:
                text = f"prefill fp32 at {result['tokens']}: {name} faster than stock's dense"
                share = 100 * result["columns"][name]["density"] * ms[STOCK] / ms[name]
                yield Goal(text, 100 * LISTS, share, "% of 1/density")


def _whole(result: dict) -> Iterator[Goal]:
    if result["tokens"] in (512, 1024):
        for name in (RETRIEVAL, HALF, STREAMING):
            text = f"whole model {result['dtype']} at {result['tokens']}: {name}, prompt to logits and one token"
            ratio = 100 * result["columns"][name]["total_ratio"]
            yield Goal(text, 100 * WHOLE, ratio, "% of stock's time", at_most=True)
