"""What was found on a set of prompts, as a table of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .measures import FEW, Mean
from .plan import DENSE, PATCHED

if TYPE_CHECKING:
    from .compare_prompts import ComparedPrompts, Prompted

WORST = 5  # prompts shown
SHOWN = 60  # characters of an answer
NAME = 16  # characters of a prompt's name
WIDTHS = (9, 8, 18, 17, 16, 7, 5)
HEADS = ("variant", "NLL", "to dense", "same token", "KL(dense || it)", "equal", "KV")


def lines(found: ComparedPrompts) -> Iterator[str]:
    """The means of every variant, and the worst prompts."""
    count = len(found.prompts)
    sizes = sorted(one.prompt_tokens for one in found.prompts)
    span = f"{sizes[0]} tokens" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]} tokens"
    given = sum(one.given for one in found.prompts)
    yield f"{count} prompt{'s' * (count != 1)} of {span}"
    yield f"answers followed: {_followed(given, count)}"
    for name, means in found.variants.items():
        yield f"{name}: {means.retrieval_heads} of {found.kv_heads} KV heads {means.kept}"
    yield ""
    yield _row(HEADS)
    yield _row((DENSE, f"{found.dense_nll:.4f}"))
    for name, means in found.variants.items():
        if len(name) > WIDTHS[0]:
            yield name
        equal = round(means.equal.mean * count)
        cells = (f"{means.nll:.4f}", f"{means.nll_lost.mean:+.4f}", f"{means.agreement.mean:.1%}")
        cells += (f"{means.kl.mean:.4f}", f"{equal}/{count}", f"{means.cache_share:.0%}")
        yield _row((name if len(name) <= WIDTHS[0] else "", *cells))
        if means.kl.low is not None:
            yield _row(("", "95%:", _span(means.nll_lost, "+.3f"), _percent(means.agreement), _span(means.kl, ".3f")))
    yield ""
    if count < FEW:
        yield f"Fewer than {FEW} prompts: intervals say little."
    yield "NLL and KL in nats a token, means over the prompts; equal: greedy answers."
    yield from _worst(found)
    for name, notes in found.notes.items():
        yield from (f"{name}: {note}" for note in notes)


def _followed(given: int, count: int) -> str:
    if given in (0, count):
        return "the given ones" if given else "dense's greedy ones"
    return f"{given} given ones, else dense's greedy ones"


def _worst(found: ComparedPrompts) -> Iterator[str]:
    shown = found.prompts[:WORST]
    rest = len(found.prompts) - len(shown)
    yield ""
    yield f"Worst first, {PATCHED}" + (f" ({rest} more in --json, as_dict())" if rest else "")
    yield f"{'prompt':<{NAME}} {'tokens':>7} {'NLL':>8} {'to dense':>9} {'same':>7} {'KL':>8}  greedy answers"
    for one in shown:
        run = one.runs[PATCHED]
        same = run.same
        answers = "equal" if same.prefix == same.compared else f"part after {same.prefix}"
        name = one.id if len(one.id) <= NAME else f"{one.id[: NAME - 3]}..."
        yield (
            f"{name:<{NAME}} {one.prompt_tokens:>7} {run.nll:>8.4f} {one.lost():>+9.4f} "
            f"{run.next_token.agreement:>7.1%} {run.next_token.kl:>8.4f}  {answers}"
        )
        if same.prefix != same.compared:
            yield from _texts(one)


def _texts(one: Prompted) -> Iterator[str]:
    for name in (DENSE, PATCHED):
        text = one.runs[name].text
        if text is not None:
            yield f"  {name:<8} {text if len(text) <= SHOWN else text[:SHOWN] + '...'!r}"


def _row(cells: tuple[str, ...]) -> str:
    first, *others = cells
    row = f"{first:<{WIDTHS[0]}}" + "".join(f"{cell:>{size}}" for cell, size in zip(others, WIDTHS[1:], strict=False))
    return row.rstrip()


def _span(mean: Mean, form: str) -> str:
    return f"{mean.low:{form}} to {mean.high:{form}}"


def _percent(mean: Mean) -> str:
    return f"{100 * mean.low:.1f} to {mean.high:.1%}"
