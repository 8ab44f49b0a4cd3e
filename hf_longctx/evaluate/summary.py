"""What the records of an evaluation say: accuracy, agreement, memory and times of every variant, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from .measures import Interval, paired_bootstrap
from .plan import DENSE, Case, EvalPlan, Window
from .positions import Span, pooled, spans_of
from .records import Record
from .sentence import sentences


@dataclass(frozen=True)
class Cell:
    """One variant over some cases.

    Attributes:
        cases: how many; ``accuracy`` is the mean of their scores.
        difference: of the accuracy to dense on the same cases, with its confidence interval; None for dense.
        nll: negative log-likelihood of the expected answers in nats per token: the mean over each case's questions, and
            of that over the cases. ``nll_difference``: to dense on the same cases, with its interval unless some are
            not finite; None for dense.
        right: share of the questions each token of whose expected answer is the greedy choice, likewise.
        positions: tokens of dense's answers and what follows each answer; ``agreement`` is the share of them where the
            most likely token is the same as dense's, ``kl`` the mean of KL(dense || variant) in nats; None for dense.
        cache_bytes: mean of the bytes held once the context was read; ``cache_share``: of dense.
        prefill_s, decode_ms: medians over the cases; ``decode_ms`` is None where no answer had a second token.
        density: mean share of the causal key blocks that sparse prefill read; None where none ran.
    """

    cases: int
    accuracy: float
    difference: Interval | None
    nll: float
    nll_difference: Interval | None
    right: float
    positions: int | None
    agreement: float | None
    kl: float | None
    kl_max: float | None
    cache_bytes: float
    cache_share: float
    prefill_s: float
    decode_ms: float | None
    density: float | None


@dataclass(frozen=True)
class Row:
    """All variants over the cases of a task, length and depth; None stands for all of them."""

    task: str | None
    length: int | None
    depth: float | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True, repr=False)
class Summary:
    """What an evaluation found.

    Attributes:
        variants: their names, dense first; ``swept`` has the values of those that a sweep made.
        overall: over all cases.
        by_length: per length over all tasks; ``by_task`` per task and length; ``by_depth`` per task, length and depth.
        perplexity: of each variant on the same text; empty without one.
        perplexity_by_position: the same text's, of all tokens predicted at a position; in records of before it was
            measured there is none.
        notes: what ran slower or otherwise than asked for, per variant; of a task over the user's own texts, under its
            name, how long they are and how many were left out.
        kernels: kernels that ran, per patched variant.
    """

    variants: tuple[str, ...]
    swept: Mapping[str, Any]
    overall: Row
    by_length: tuple[Row, ...]
    by_task: tuple[Row, ...]
    by_depth: tuple[Row, ...]
    perplexity: Mapping[str, float]
    perplexity_by_position: tuple[Span, ...]
    notes: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(sentences(self))

    __repr__ = __str__  # what a notebook shows

    @property
    def bounded(self) -> bool:
        """Whether lengths are the most tokens of a prompt: some of the texts are the user's own."""
        return any(task in self.notes for task in self.tasks)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, as they were given."""
        return tuple(dict.fromkeys(row.task for row in self.by_task))


def summarize(plan: EvalPlan, records: Iterable[Record]) -> Summary:
    """The summary of a plan all of whose records are there."""
    found = {(record["variant"], record["case"]): record for record in records}
    names = [variant.name for variant in plan.variants]
    cases = [case for case in plan.cases if isinstance(case, Case)]

    def rows(key: Callable[[Case], tuple]) -> tuple[Row, ...]:
        groups: dict[tuple, list[Case]] = {}
        for case in cases:
            groups.setdefault(key(case), []).append(case)
        return tuple(Row(*where, row_of(names, found, group)) for where, group in groups.items())

    windows = [case for case in plan.cases if isinstance(case, Window)]
    read = {name: [found[name, case.key] for case in windows] for name in names if windows}
    order = list(dict.fromkeys(case.task.name for case in cases))

    def told(field: str) -> dict[str, tuple[str, ...]]:
        said = {name: dict.fromkeys(one for case in cases for one in found[name, case.key][field]) for name in names}
        return {name: tuple(words) for name, words in said.items() if words}

    return Summary(
        variants=tuple(names),
        swept={variant.name: variant.swept for variant in plan.variants if variant.swept is not None},
        overall=rows(lambda case: (None, None, None))[0],
        by_length=rows(lambda case: (None, case.length, None)),
        by_task=_sorted(rows(lambda case: (case.task.name, case.length, None)), order),
        by_depth=_sorted(rows(lambda case: (case.task.name, case.length, case.depth)), order),
        perplexity={name: pooled(own).value for name, own in read.items()},
        perplexity_by_position=spans_of(read),
        notes=told("notes") | plan.notes,
        kernels=told("kernels"),
    )


def _sorted(rows: Sequence[Row], order: list[str]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: (order.index(row.task), row.length, row.depth or 0.0)))


def row_of(names: Sequence[str], found: Mapping[tuple[str, str], Record], cases: Sequence[Case]) -> dict[str, Cell]:
    """The cell of every variant over the same cases."""
    dense = [found[DENSE, case.key] for case in cases]
    return {name: cell(dense, [found[name, case.key] for case in cases], name == DENSE) for name in names}


def cell(dense: Sequence[Record], own: Sequence[Record], same: bool) -> Cell:
    """A variant's cell from its records and those of dense, in the same order; ``same``: it is dense."""

    def pooled(name: str) -> float | None:
        return None if same else sum(one[name] * one["positions"] for one in own) / positions

    positions = None if same else sum(one["positions"] for one in own)
    held = [sum(one["cache_bytes"] for one in records) for records in (own, dense)]
    decode = [one["decode_ms"] for one in own if one["decode_ms"] is not None]
    densities = [one["density"] for one in own if one["density"] is not None]
    scores = [[one["score"] for one in records] for records in (dense, own)]
    losses = [[answer_nll(one) for one in records] for records in (dense, own)]
    return Cell(
        cases=len(own),
        accuracy=mean(scores[1]),
        difference=None if same else paired_bootstrap(*scores),
        nll=mean(losses[1]),
        nll_difference=None if same else _difference(*losses),
        right=mean(mean(one["expected_right"]) for one in own),
        positions=positions,
        agreement=pooled("agreement"),
        kl=pooled("kl"),
        kl_max=None if same else max(one["kl_max"] for one in own),
        cache_bytes=held[0] / len(own),
        cache_share=held[0] / held[1],
        prefill_s=median(one["prefill_s"] for one in own),
        decode_ms=median(decode) if decode else None,
        density=mean(densities) if densities else None,
    )


def answer_nll(record: Record) -> float:
    """Nats per token of the expected answers of a record, the mean over its questions."""
    answers = zip(record["expected_nll"], record["expected_tokens"], strict=True)
    return mean(nll / tokens for nll, tokens in answers)


def _difference(dense: Sequence[float], own: Sequence[float]) -> Interval:
    if all(map(math.isfinite, (*dense, *own))):
        return paired_bootstrap(dense, own)
    return Interval(mean(own) - mean(dense), None, None, len(own), 0.95)


LINE = ("task", "tokens", "variant", "cases", "accuracy", "to dense", "95% interval", "all tokens right", "NLL")
LINE += ("NLL to dense", "NLL interval", "same next token", "KL, nats")
LINE += ("KV MB", "KV of dense", "prefill s", "decode ms")


def line(row: Row, name: str) -> list[str]:
    """A variant's figures, in the order of ``LINE``."""
    cell = row.cells[name]
    lost = cell.difference
    return [
        row.task or "all",
        "all" if row.length is None else str(row.length),
        name,
        str(cell.cases),
        f"{cell.accuracy:.3f}",
        marked(lost),
        interval(lost),
        f"{cell.right:.3f}",
        f"{cell.nll:.3f}",
        "" if cell.nll_difference is None else f"{cell.nll_difference.difference:+.3f}",
        interval(cell.nll_difference),
        "" if cell.agreement is None else f"{cell.agreement:.1%}",
        "" if cell.kl is None else f"{cell.kl:.2g}",
        f"{cell.cache_bytes / 1e6:.2f}",
        f"{cell.cache_share:.0%}",
        f"{cell.prefill_s:.3g}",
        "" if cell.decode_ms is None else f"{cell.decode_ms:.3g}",
    ]


def marked(lost: Interval | None) -> str:
    """``+0.020``, and ``-0.667 worse`` where the difference is significant; empty for dense."""
    if lost is None:
        return ""
    said = f" {lost.verdict}" if lost.verdict in ("worse", "better") else ""
    return f"{lost.difference:+.3f}{said}"


def interval(lost: Interval | None) -> str:
    """``-0.05 to +0.02``; a dash where one pair says nothing."""
    if lost is None:
        return ""
    return "-" if lost.low is None else f"{lost.low:+.3f} to {lost.high:+.3f}"
