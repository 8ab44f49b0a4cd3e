"""What a kernel is, how one is chosen, and the one place where parts of an attention call are merged.

A kernel is a module of this folder, or a module or object that was registered (``register``):

- ``NAME: str``, its word in a config (the file name);
- ``PREFERENCE: int``, higher is tried first by ``auto`` (reference 0, cpu 10, native 20; leave room between; below 0:
  by name alone);
- ``READS: frozenset[type]``, the classes of reads that it computes on some device; for others ``auto`` picks another;
- ``supports(case: Case) -> str | None``: None, or the reason why it does not compute the case;
- ``attend(q, segments, reads, scores, want_lse=True) -> (out, lse)``: q ``[B, H, T, D]``, out ``[B, H, T, D_v]`` in the
  dtype of q, lse ``[B, H, T]`` (natural log) in float32 or wider; a query that reads nothing gives 0 and -inf. Where
  ``want_lse`` is False, lse may be None. Of `Scores` it computes all but ``sinks``, which are added here.

Optional:

- ``preference(case) -> int``, at most PREFERENCE, which it takes the place of for a case that ``supports`` takes: less
  where another kernel was measured to be faster. It is asked once per forward and case, and only looks up.
- ``attend_layer(q, parts, scores) -> (out, lse)``, one decoded token of all roles in one launch, where ``parts`` are
  (KV heads, segments).
- ``Step(heads)``, of which a layer has one for the `RoleHeads` of its stores: its ``run(q, k, v, places, scale)``
  writes one new token of every sequence, k and v ``[B, H_kv, 1, D]``, to the stores' places and gives what the token
  reads, out ``[B, 1, H, D]``; or None, and writes nothing.
- ``best_pages(q, bounds, sub, width)``, which pages the query heads of each KV head read together: the ``width`` with
  the highest `reference.page_scores` of a head and part, of equal ones the first, int32 ``[B, n, width]``, ascending;
  or None where it does not compute them. q is ``[B, H, 1, D]``; ``bounds`` are of ``sub`` parts of each page, ``[B, n,
  P * sub, 2 D]`` in pieces along P.

The kernel ``reference`` computes everything, by definition. A kernel must import on every machine, or fail with
ImportError, which is then the reason. Nothing lists kernels.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.words import near, registered, words
from ..errors import ConfigError, UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.dtypes import needs_grad
from ..layout.forward import Forward
from ..layout.gather import gathered, lying
from ..layout.heads import RoleHeads
from ..layout.merged import Merged
from ..layout.ragged import Ragged
from ..layout.reads import ALL, All, Causal, Reads
from ..layout.scores import Scores
from ..layout.segments import Segment
from ..layout.streamed import Piece, Streamed
from ..layout.thinned import Thinned
from . import _merged, _thinned
from .reference import merge, with_sinks

AUTO = "auto"
NO_KINDS: frozenset[Hashable] = frozenset()
FEW = 24  # queries that native computes as it decodes: FEW_TOKENS of _native/decode.h
STREAMED = "streamed"  # what the report calls segments that were read block by block
AS_THEY_ARE = {Thinned: _thinned.attend, Merged: _merged.attend}  # pieces that few queries read so, by any kernel

Part = tuple[Tensor, Tensor]  # out and logsumexp


class Case(NamedTuple):
    """What a kernel is asked about, once per forward.

    Attributes:
        device, dtype, head_dim: of q.
        needs_grad: gradients must flow through the call.
        reads: the class of its reads.
        one_query: T is 1.
        kinds: the ``kind`` of its segments that are not plain ones.
        softcap, first_bias: whether `Scores` has them.
        few: T is more than 1 and at most `FEW`, as where drafted tokens are checked.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False
    reads: type = Causal
    one_query: bool = False
    kinds: frozenset[Hashable] = NO_KINDS
    softcap: bool = False
    first_bias: bool = False
    few: bool = False

    def __str__(self) -> str:
        gradients = "with" if self.needs_grad else "without"
        return f"{self.dtype} on {self.device.type}, head_dim {self.head_dim}, {gradients} gradients"


def case_of(q: Tensor, segments: Sequence[Segment | Streamed], reads: Reads, scores: Scores) -> Case:
    """The case of a call."""
    tensors = [q, scores.first_bias]  # sinks are added here
    kinds = NO_KINDS
    for one in segments:
        if isinstance(one, Segment):
            tensors += (one.k, one.v)
        else:
            kinds |= {one.kind}
            if isinstance(one, Ragged):
                tensors += (one.k, one.v)
    return Case(
        q.device,
        q.dtype,
        q.shape[3],
        needs_grad(*tensors),
        type(reads),
        q.shape[2] == 1,
        kinds,
        scores.softcap is not None,
        scores.first_bias is not None,
        1 < q.shape[2] <= FEW,
    )


def names() -> tuple[str, ...]:
    """The kernels there are, from the folder's listing and registered ones, in alphabetical order."""
    return words("kernels")


def pick(word: str, case: Case) -> ModuleType:
    """The kernel module ``word`` (``auto``: the preferred one) that computes ``case``.

    Raises:
        ConfigError: there is no such kernel.
        UnsupportedModeError: the kernel asked for does not compute this case, or none does.
    """
    known = (AUTO, *names())
    if word not in known:
        raise ConfigError(f"unknown kernel {word!r}; known: {', '.join(known)}.{near(word, known)}")
    module, reasons = _first(word, case)
    if module is not None:
        return module
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UnsupportedModeError(f"kernel {word!r} does not compute {case} ({why}). {_advice(word, case)}")


def require(word: str, reads: type, wanted: str) -> None:
    """Refuse early, before a model runs, a kernel that computes no such reads, which ``wanted`` (words) needs.

    Raises:
        UnsupportedModeError: the message names the kernels that compute them.
    """
    if word not in names() or (module := _module(word)) is None or reads in module.READS:
        return
    works = [name for name, one, _ in _candidates(names()) if one is not None and reads in one.READS]
    raise UnsupportedModeError(
        f"{wanted} needs a kernel that reads a {reads.__name__}, which kernel {word!r} does not. Use kernel: {AUTO} or "
        f"one of: {', '.join(works)}"
    )


def choose(word: str, case: Case, forward: Forward) -> ModuleType:
    """`pick`, asked once per forward; the report names the kernel.

    Raises:
        ConfigError: as `pick`.
        UnsupportedModeError: as `pick`.
    """
    kernel = forward.kernels.get((word, case))
    if kernel is None:
        module = _module(word)
        other = module is not None and case.reads not in module.READS
        kernel = forward.kernels[word, case] = pick(AUTO if other else word, case)
    forward.log.used.add(kernel.NAME)
    return kernel


def attend(
    word: str,
    q: Tensor,
    segments: Sequence[Segment | Streamed],
    reads: Reads,
    scores: Scores,
    forward: Forward,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q ``[B, H, T, D]`` over one role's segments: out ``[B, H, T, D_v]``, lse ``[B, H, T]``.

    Segments that the kernel does not read as they are come to it block by block, and are merged by logsumexp.

    Args:
        word: the config's ``kernel``, but ``stock``.
        want_lse: lse may be None without it.

    Raises:
        UnsupportedModeError: as `pick`.
    """
    own = scores if scores.sinks is None else Scores(scores.scale, scores.softcap, None, scores.first_bias)
    case = case_of(q, segments, reads, own)
    if case.kinds and not _reads_kinds(word, case, forward):
        streamed = _listed if isinstance(reads, BlockList) else _streamed
        out, lse = streamed(word, q, segments, reads, own, forward)
    else:
        kernel = choose(word, case, forward)
        out, lse = kernel.attend(q, segments, reads, own, want_lse or scores.sinks is not None)
    return (out, lse) if scores.sinks is None else with_sinks(out, lse, scores.sinks)


def new_step(word: str, device: torch.device, dtype: torch.dtype, head_dim: int, heads: Sequence[RoleHeads]) -> Any:
    """The ``Step`` of the kernel that computes decoded tokens of a layer; None where it has none."""
    module, _ = _first(word, Case(device, dtype, head_dim, reads=All, one_query=True))
    step = getattr(module, "Step", None)
    return None if step is None else step(heads)


def page_chooser(word: str, q: Tensor) -> Callable[..., Tensor | None] | None:
    """``best_pages`` of the kernel that computes lists of such a query; None where it has none."""
    module, _ = _first(word, Case(q.device, q.dtype, q.shape[3], reads=BlockList, one_query=True))
    return getattr(module, "best_pages", None)


def some_launch_layers(word: str, device: torch.device, forward: Forward) -> bool:
    """Whether `choose` may give a kernel with ``attend_layer`` on this device; asked once per forward."""
    key = (word, device)
    if key not in forward.kernels:
        able = [module for _, module, _ in _candidates(_tried(word)) if hasattr(module, "attend_layer")]
        probe = Case(device, torch.bfloat16, 64, one_query=True, reads=All)
        forward.kernels[key] = any(one.supports(probe) is None for one in able)
    return forward.kernels[key]


def _reads_kinds(word: str, case: Case, forward: Forward) -> bool:
    """Whether the kernel, or with ``auto`` some kernel, reads these segments as they are."""
    key = (word, case)
    if key not in forward.kernels:
        forward.kernels[key], _ = _first(word, case)
    return forward.kernels[key] is not None


def _streamed(
    word: str, q: Tensor, segments: Sequence[Segment | Streamed], reads: Reads, scores: Scores, forward: Forward
) -> Part:
    """One block at a time, each merged before the next is asked for: it may end the last one.

    The queries lie in the last segment, which is a plain one if there is more than one of them.
    """
    past, last = (segments[:-1], segments[-1:]) if q.shape[2] > 1 else (segments, ())
    merged = None
    first = scores.first_bias is not None
    for block in _blocks(past, first, whole=q.shape[2] > FEW or first):
        if type(block) in AS_THEY_ARE:
            merged = _with(merged, AS_THEY_ARE[type(block)](q, block, scores))
        else:
            merged = _with(merged, _attend_plain(word, q, block, ALL, scores, forward))
        scores = Scores(scores.scale, scores.softcap)  # the first token is in the first block
    for own in last:
        merged = _with(merged, _attend_plain(word, q, own, reads, scores, forward))
    forward.log.used.add(STREAMED)
    forward.log.notes.update(one.note for one in segments if not isinstance(one, Segment) and one.note)
    out, lse = merged
    return out.to(q.dtype), lse


def _listed(
    word: str, q: Tensor, segments: Sequence[Segment | Streamed], reads: BlockList, scores: Scores, forward: Forward
) -> Part:
    """What the lists of one query name is fetched or unpacked, and nothing else.

    A bias of the first token is added to the first that is named: selections name it always.
    """
    if q.device.type == "cpu" and (plain := lying(segments, reads)) is not None:
        kernel = choose(word, case_of(q, plain, reads, scores), forward)
        return kernel.attend(q, plain, reads, scores, True)
    return _attend_plain(word, q, gathered(segments, reads), ALL, scores, forward)


def _attend_plain(word: str, q: Tensor, segment: Segment, reads: Reads, scores: Scores, forward: Forward) -> Part:
    kernel = choose(word, case_of(q, (segment,), reads, scores), forward)
    return kernel.attend(q, [segment], reads, scores, True)


def _blocks(segments: Sequence[Segment | Streamed], first: bool, whole: bool) -> Iterator[Segment | Piece]:
    """Plain segments; but pieces as they are where queries are few, and keys need not be ``whole``.

    ``first``: slot 0 of the first block is the first token, hidden where it is no longer there.
    """
    for segment in segments:
        if first and isinstance(segment, Ragged):
            token, segment = segment.first_apart()
            yield token
        as_it_is = isinstance(segment, Segment) or (type(segment) in AS_THEY_ARE and not whole)
        yield from (segment,) if as_it_is else segment.blocks()


def _with(merged: Part | None, part: Part) -> Part:
    out, lse = part
    part = (out.to(lse.dtype), lse)  # rounded to a low precision after each block, the error would add up
    return part if merged is None else merge([merged, part])


def _tried(word: str) -> Sequence[str]:
    """The kernels that a config's word may mean."""
    return names() if word == AUTO else [word]


def _first(word: str, case: Case) -> tuple[ModuleType | None, dict[str, str | None]]:
    """The preferred kernel that computes the case, and why those before it do not; None where none does."""
    reasons: dict[str, str | None] = {}
    best = None
    most = 0
    for name, module, failure in _candidates(_tried(word)):
        if best is not None and (module is None or most >= module.PREFERENCE):
            break  # no later one can be preferred
        reasons[name] = failure if module is None else _refusal(module, case)
        if reasons[name] is None:
            own = module.preference(case) if hasattr(module, "preference") else module.PREFERENCE
            if best is None or own > most:
                best, most = module, own
    return best, reasons


def _module(word: str) -> ModuleType | None:
    """The kernel of this name; None where it cannot be imported, or where there is none."""
    return _candidates([word])[0][1] if word in names() else None


def _refusal(module: ModuleType, case: Case) -> str | None:
    """Why this kernel does not compute the case; None if it does."""
    if case.reads not in module.READS:
        return f"computes no {case.reads.__name__}"
    return module.supports(case)


def _candidates(words: Sequence[str]) -> list[tuple[str, ModuleType | None, str | None]]:
    """(name, module, why it cannot be imported) of these kernels, preferred ones first."""
    found = []
    for name in words:
        full = f"{__package__}.{name}"
        try:  # import_module takes a lock even for what is there
            own = registered["kernels"].get(name) or sys.modules.get(full)
            found.append((name, own or importlib.import_module(full), None))
        except ImportError as error:
            found.append((name, None, f"cannot be imported ({error})"))
    return sorted(found, key=lambda entry: -(entry[1].PREFERENCE if entry[1] else 0))


def _advice(word: str, case: Case) -> str:
    """What works instead, as the last sentence of the error."""
    others = [(name, module) for name, module, _ in _candidates(names()) if name != word and module is not None]
    works = [name for name, module in others if _refusal(module, case) is None]
    return f"Use kernel: {AUTO} or one of: {', '.join(works)}" if works else "Use a floating point dtype."
