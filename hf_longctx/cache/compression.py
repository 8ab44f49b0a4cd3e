"""Evicting when it is asked for: by any score, also by one for which the model reads something after the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.bounds import MOST
from ..config.checks import check_word
from ..config.words import build, make, spec_word
from ..errors import CacheError, ConfigError, UnsupportedModeError
from ..eviction.base import Asked, Context, Score
from ..layout.rows import Rows
from ..stores._asked import Judging, judged_of, scoring_by, take
from ..stores.evicted import BY, Budget, Evicted
from .eviction import Eviction
from .seam import CACHE
from .weights import input_device

if TYPE_CHECKING:
    from .cache import LongCtxCache


class Compression(Eviction):
    """Part of `LongCtxCache`."""

    def compress(
        self,
        score: Score | str | Mapping[str, Any] | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        by: str | None = None,
        *,
        tokenizer: Any = None,
        ids: Tensor | Sequence[int] | None = None,
        follows: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Evict now, of the heads whose store is ``evicted``: as the config says, or by another score or budget.

        For ``kvzip`` and ``draft`` the model reads more on copies of this cache, which stays as it is until all scores
        are known: the text once more, or a draft of its answer. A config that names such a score never evicts by
        itself; until this is called all its tokens are cached. What the scores say of a token is kept with it, so that
        a text may go on and be compressed again. A later prompt ends as the config says.

        Args:
            score: a word of ``eviction/``, a mapping as in YAML, or the score itself; None: the config's.
            budget: ``{"share": 0.3}`` or ``{"tokens": 2000}``; None: the config's.
            by: who shares the budget, as in the config; None: the config's. Heads that keep different numbers of tokens
                in the config do so here.
            tokenizer: for scores that ask the model in words.
            ids: the text's token ids ``[S]`` without pads, where this cache does not know them (``inputs_embeds``).
            follows: ids ``[T]`` of what comes next, for ``draft``.

        Raises:
            CacheError: an earlier forward was interrupted, or the score lacks queries, tokens or ids that it needs.
            ConfigError: an unknown score, a wrong budget, or something that the score needs was not given.
            UnsupportedModeError: no head's tokens are evicted by score, several sequences, or a model in training.
        """
        self.check()
        spec = self._spec_for(score, budget, by)
        if not self.seen:
            return
        asked = isinstance(spec.rule, Asked)
        self._refuse_unused(spec.rule, asked, tokenizer=tokenizer, ids=ids, follows=follows)
        with ExitStack() as stack:
            for _, store in self._evicting:
                stack.enter_context(scoring_by(store, spec))
            if asked:
                self._judge(spec, tokenizer, ids, follows)
            self._end_text()
            self._evict()

    def end_document(self, tokenizer: Any = None) -> None:
        """End a text that is kept for several questions: evict where the config's score does not look for one.

        A score that does evicts where each question ends, on its own copy of the cache.

        Raises:
            CacheError: an earlier forward was interrupted, or a score lacks what it needs.
        """
        rule = self.rule
        if rule is None or not rule.agnostic or not self.seen:
            return
        if isinstance(rule, Asked):
            self.compress(tokenizer=tokenizer)
        else:
            self.evict()

    @property
    def rule(self) -> Score | None:
        """The config's score; None where no tokens are evicted by one."""
        return next((store.spec.rule for _, store in self._evicting), None)

    def _spec_for(self, score: Any, budget: Any, by: str | None) -> Evicted:
        own = next((store.spec for _, store in self._evicting), None)
        if own is None:
            raise UnsupportedModeError(
                "compress: no head of this cache evicts tokens by score. Set stores.retrieval to {store: evicted, ...} "
                "in the config."
            )
        given: dict[str, Any] = {}
        if score is not None:
            named = {"score": score} if isinstance(score, str) else score
            given["rule"] = build("eviction", named, "score", "score", "retrieval")
        if budget is not None:
            given["budget"] = budget if isinstance(budget, Budget) else make(Budget, budget, "budget")
        if by is not None:
            check_word(by, BY, "by")
            given |= {"by": by, "floor": own.floor if by in ("head", "model") else None}
        spec = replace(own, **given)
        if spec.ragged != own.ragged:
            works = "head, model" if own.ragged else "uniform, layer"
            raise ConfigError(
                f"by: got {spec.by!r}, and the heads of this cache keep as the config says (by {own.by!r}): "
                f"{'different' if own.ragged else 'equal'} numbers of tokens. What works here: {works}."
            )
        return spec

    def _refuse_unused(self, rule: Score, asked: bool, **given: Any) -> None:
        names = [name for name, value in given.items() if value is not None]
        if names and not asked:
            raise ConfigError(
                f"{', '.join(names)}: score {spec_word(rule)!r} reads nothing after the text and needs none of these. "
                "Leave them out."
            )
        if asked and (self.batch_size != 1 or self.ends is not None):
            raise UnsupportedModeError(
                f"score {spec_word(rule)!r} reads on after one text, and this cache holds {self.batch_size} sequences"
                f"{' with pads on the right' if self.ends is not None else ''}. Compress each alone, in a cache of its "
                "own."
            )

    def _judge(self, spec: Evicted, tokenizer: Any, ids: Any, follows: Any) -> None:
        """Let the model read what the score asks for, and keep what it says of each cached token."""
        rows = Rows(1, 0, self.seen, self.starts)
        stores = [store for _, store in self._evicting]
        text = self._text(ids, rows)
        new = judged_of(stores[0], rows)
        gone = new is None and any(store.cut is not None for store in stores)
        first = min(spec.sink, len(text)) if new is None else len(text) - new
        context = Context(
            text, first, spec.sink, gone, tokenizer, None if follows is None else _row(follows, "follows")
        )
        found: list[dict[int, list[Tensor]]] = [{} for _ in stores]
        for reading in spec.rule.readings(context):
            for kept, shown in zip(found, self._shown_to(spec.rule, reading), strict=True):
                for head, scores in shown.found.items():
                    kept.setdefault(head, []).extend(scores)
        for store, scores in zip(stores, found, strict=True):
            take(store, rows, scores)

    @torch.no_grad()
    def _shown_to(self, rule: Asked, reading: Any) -> list[Judging]:
        """What each store's copy was shown while the model read ``reading`` after this cache."""
        base = self._base()
        other: LongCtxCache = self.fork()
        other.prompt_end, other.paused = MOST, True
        judges = []
        for _, store in other._evicting:
            store.watcher = Judging(store, rule, reading)
            judges.append(store.watcher)
        ids = reading.ids[None].to(input_device(base))
        rows = Rows(1, self.seen, ids.shape[1], self.starts)
        given: dict[str, Any] = {}
        if rows.padded:  # as generate() has it
            real = torch.arange(rows.total, device=ids.device) >= rows.start(0)
            given = {"attention_mask": real[None].long(), "position_ids": rows.positions(ids.device)}
        state = base.longctx_state
        try:
            base(input_ids=ids, **given, **{CACHE: other}, use_cache=True)
        finally:
            state.go_back_to(self)
        return judges

    def _base(self) -> nn.Module:
        base = self.model() if self.model else None
        if base is None:
            raise CacheError(
                "compress: the model that filled this cache is gone, or has not used it since it was unpickled. Let it "
                "read at least one token with this cache first."
            )
        if base.training:
            raise UnsupportedModeError("compress: the model is in training mode. Call model.eval() first.")
        return base

    def _text(self, ids: Any, rows: Rows) -> Tensor:
        """Ids ``[S]`` of the tokens of the one sequence, on the CPU."""
        tokens = rows.real(0)[1]
        if ids is None:
            if self.ids is None:
                raise CacheError(
                    "compress: the ids of this cache's tokens are not known: they came as inputs_embeds, or their keys "
                    "were written by hand. Give ids=."
                )
            return self.ids[0, rows.start(0) :].cpu()
        if len(given := _row(ids, "ids")) != tokens:
            raise CacheError(f"ids: got {len(given)} token ids, and this cache has read {tokens} tokens.")
        return given

    def _end_text(self) -> None:
        """The text that was read ends here."""
        self.reading = False
        self.prompt_end = None


def _row(ids: Any, name: str) -> Tensor:
    """Token ids as int64 ``[S]`` on the CPU; ``[1, S]`` is taken as well."""
    given = torch.as_tensor(ids)
    given = given[0] if given.dim() == 2 and given.shape[0] == 1 else given
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ConfigError(f"{name}: got a {given.dtype} of shape {list(given.shape)}, expected token ids of one row.")
    return given.to("cpu", torch.int64)
