"""What a store knows of its heads' queries, by sequence and KV head, and what a file says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..eviction._evidence import Evidence, of_heads
from ..eviction.base import JUDGED, Score
from ..layout.rotation import Rotation
from ..layout.scores import Scores
from ._left import ALL
from ._saved import SavedStore, Told, short

Key = tuple[int, int]  # a sequence and a KV head, or `ALL`
BY_HEAD = ("sinks", "first_bias")  # numbers of `Scores` by query head


class Known:
    """The evidence of one layer's heads.

    Attributes:
        parts: by sequence and KV head; those of all are `ALL` as long as they are alike.
        scores: how attention makes scores of these heads' queries; None: no query was seen.
        rotation, layer: of the layer, for the score.
    """

    rotation: Rotation | None = None
    layer: int = 0

    def __init__(self, rule: Score, heads: int):
        self.rule = rule
        self.heads = heads
        self.clear()

    def clear(self) -> None:
        self.parts: dict[Key, Evidence] = {}
        self.scores: Scores | None = None

    def saw(self, scores: Scores) -> None:
        """How scores are made, without the weights' gradients."""
        own = {name: x if x is None else x.detach() for name in BY_HEAD for x in [getattr(scores, name)]}
        self.scores = replace(scores, **own)

    def scores_of(self, head: int, head_dim: int) -> Scores:
        scores = self.scores or Scores(head_dim**-0.5)
        return of_heads(scores, range(self.heads) if head == ALL else (head,), self.heads)

    def of(self, group: slice, start: int, head: int, batch: int) -> Evidence:
        """What is known of these sequences and heads; what was known of all is parted where it is asked of one."""
        row = ALL if group == slice(None) else group.start
        if row != ALL and (ALL, head) in self.parts:
            whole = self.parts.pop((ALL, head))
            self.parts |= {(one, head): whole.part(one) for one in range(batch)}
        if row == ALL and (0, head) in self.parts:
            parts = [self.parts.pop((one, head)) for one in range(batch)]
            self.parts[ALL, head] = Evidence.together(parts)
        if (row, head) not in self.parts:
            self.parts[row, head] = Evidence(self.rule, self.layer, self.rotation, start)
        return self.parts[row, head]

    def all_kept(self) -> Known:
        """Once a prompt was scored of which all is kept."""
        return self._with({key: one.of_tokens for key, one in self.parts.items()})

    def kept(self, keep: Sequence[Sequence[Tensor]], apart: bool) -> Known:
        """What is still known once the tokens of the masks ``keep`` are left: what was gathered of all queries.

        Args:
            keep: bool ``[S]`` of each sequence's KV heads.
            apart: heads have different numbers of tokens from now on.
        """
        index = [[mask.nonzero()[:, 0] for mask in heads] for heads in keep]
        known: dict[Key, Evidence] = {}
        for (row, head), one in self.parts.items() if self.rule.gathers or self.rule.by_token else ():
            if not apart:
                known[row, head] = one.kept(index if row == ALL else [index[row]])
                continue
            for own in range(len(keep)) if row == ALL else (row,):
                for kv in range(self.heads) if head == ALL else (head,):
                    only = (kv, self.heads) if head == ALL else None
                    part = one.part(own if row == ALL else None, only)
                    known[own, kv] = part.kept([[index[own][kv]]])
        return self._with(known)

    def for_rule(self, rule: Score, whole: bool) -> Known:
        """What is known of it for another score; ``whole``: what was gathered too."""
        parts = {}
        for key, one in self.parts.items():
            state = {name: x for name, x in one.state.items() if whole or name == JUDGED}
            parts[key] = replace(one, rule=rule, state=state)
        other = self._with(parts)
        other.rule = rule
        return other

    def _with(self, parts: dict[Key, Evidence]) -> Known:
        other = Known(self.rule, self.heads)
        vars(other).update(vars(self) | {"parts": parts})
        return other

    def crop(self, target: int) -> None:
        for one in self.parts.values():
            one.crop(target - one.start)

    @property
    def oldest_crop(self) -> int:
        """Fewest slots that `crop` can go back to."""
        return max((one.start + one.oldest_crop for one in self.parts.values() if one.oldest_crop), default=0)

    def map_rows(self, change: Callable[[Tensor], Tensor], order: Sequence[int]) -> None:
        """``order``: the sequence that each one was."""
        mapped = {key: one.map(change) for key, one in self.parts.items() if key[0] == ALL}
        for new, old in enumerate(order):
            mapped |= {(new, head): one.part() for (row, head), one in self.parts.items() if row == old}
        self.parts = mapped

    def fork(self) -> Known:
        return self._with({key: one.part() for key, one in self.parts.items()})

    def tensors(self) -> Iterator[Tensor]:
        for one in self.parts.values():
            yield from one.tensors()

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` needs: tensors by name, and plain data that JSON can hold."""
        tensors: dict[str, Tensor] = {}
        plain = []
        for at, ((row, head), one) in enumerate(sorted(self.parts.items(), key=lambda item: item[0])):
            own = {} if one.q is None else {"q": one.q}
            tensors |= {f"{at}.{name}": x for name, x in own.items()}
            tensors |= {f"{at}.state.{name}": x for name, x in one.state.items()}
            numbers = {name: getattr(one, name) for name in ("start", "processed", "gathered")}
            queries = 0 if one.q is None else one.q.shape[2]
            plain.append({"row": row, "head": head, **numbers, "queries": queries, "state": sorted(one.state)})
        if self.scores is None:
            return tensors, {"parts": plain, "scores": None}
        by_head = {name: x for name in BY_HEAD if (x := getattr(self.scores, name)) is not None}
        cap = self.scores.softcap
        told = {"scale": float(self.scores.scale), "softcap": None if cap is None else float(cap)}
        return tensors | by_head, {"parts": plain, "scores": told | {name: name in by_head for name in BY_HEAD}}

    def restore(self, read: Callable[[str], Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
        """Fill this empty one with what `saved` gave, each tensor as ``read(name)`` gives it, onto ``device``."""

        def copied(name: str) -> Tensor:
            return read(name).to(device, copy=True)

        if (told := plain["scores"]) is not None:
            by_head = {name: copied(name) if told[name] else None for name in BY_HEAD}
            self.scores = Scores(told["scale"], told["softcap"], **by_head)
        for at, one in enumerate(plain["parts"]):
            numbers = {name: one[name] for name in ("start", "processed", "gathered")}
            state = {name: copied(f"{at}.state.{name}") for name in one["state"]}
            q = copied(f"{at}.q") if one["queries"] else None
            own = Evidence(self.rule, self.layer, self.rotation, q=q, state=state, **numbers)
            self.parts[one["row"], one["head"]] = own

    def check(self, saved: SavedStore, told: Told, prefix: str, cached: Callable[[int, int, int], int]) -> None:
        """Raise CacheError unless `restore` can take what is told, and the tensors whose names begin with ``prefix``.

        Args:
            cached: how many tokens of a sequence's KV head are cached of its first so many.
        """
        fields = told.fields("parts", "scores")
        scores = self._check_scores(saved, fields["scores"], prefix)
        found: list[Key] = []
        for at, one in enumerate(fields["parts"].items()):
            parts = one.fields("row", "head", "start", "processed", "gathered", "queries", "state")
            row = parts["row"].number(0 if any(saved.starts) else ALL, saved.rows.batch - 1)
            head = parts["head"].number(ALL, self.heads - 1)
            kinds = {(row == ALL, head == ALL) for row, head in (*found, (row, head))}
            if (row, head) != max([*found, (row, head)]) or (row, head) in found or len(kinds) > 1:
                one.refuse(f"got row {row} and head {head}, expected each once and in order, or {ALL} for all of them")
            found.append((row, head))
            self._check_part(saved, one, parts, f"{prefix}{at}.", scores, cached)

    def _check_scores(self, saved: SavedStore, told: Told, prefix: str) -> Scores:
        if told.value is None:
            return Scores(1.0)
        fields = told.fields("scale", "softcap", *BY_HEAD)
        cap = fields["softcap"]
        by_head = dict.fromkeys(BY_HEAD)
        for name in BY_HEAD:
            if fields[name].one_of(False, True):
                dtype = saved.tensors.floating(f"{prefix}{name}", self.heads * saved.group)
                by_head[name] = torch.zeros(self.heads * saved.group, dtype=dtype)
        return Scores(fields["scale"].real(), None if cap.value is None else cap.real(), **by_head)

    def _check_part(
        self,
        saved: SavedStore,
        told: Told,
        parts: Mapping[str, Told],
        prefix: str,
        scores: Scores,
        cached: Callable[[int, int, int], int],
    ) -> None:
        row, head = parts["row"].value, parts["head"].value
        start = saved.rows.start(max(0, row))
        parts["start"].number(start, start)
        processed = parts["processed"].number(0, max(0, saved.rows.total - start))
        gathered = parts["gathered"].number(0, processed)
        queries = parts["queries"].number(0, processed if self.rule.queries or self.rule.gathers else 0)
        if self.rule.gathers and processed - queries > gathered:
            parts["gathered"].refuse(f"got {gathered}, expected what the {queries} queries do not have of {processed}")
        batch, heads = saved.rows.batch if row == ALL else 1, self.heads if head == ALL else 1
        if queries:
            saved.tensors.check(f"{prefix}q", saved.dtype, batch, heads * saved.group, queries, saved.head_dim)
        tokens = cached(max(0, row), max(0, head), gathered)
        names = [one.value for one in parts["state"].items()]
        if JUDGED in names:
            names.remove(JUDGED)
            length = saved.tensors.shapes.get(f"{prefix}state.{JUDGED}", ("", ()))[1][-1:]
            saved.tensors.floating(f"{prefix}state.{JUDGED}", batch, heads, *(min(one, tokens) for one in length))
        if not names:
            return
        own = Evidence(self.rule, self.layer, self.rotation, processed=gathered)
        k = torch.zeros((), dtype=saved.dtype).expand(batch, heads, tokens, saved.head_dim)
        q = torch.zeros(batch, heads * saved.group, 1, saved.head_dim, dtype=saved.dtype)
        expected = own.expected(q, k, of_heads(scores, range(heads), self.heads)) if tokens and gathered else {}
        if names != sorted(expected):
            told.refuse(f"its state is {short(names)}, expected {short(sorted(expected))}")
        for name, x in expected.items():
            saved.tensors.floating(f"{prefix}state.{name}", *x.shape)
