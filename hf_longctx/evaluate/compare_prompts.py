"""``compare_prompts``: dense against patched on a set of the user's own prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.config import LongCtxConfig
from ..errors import ConfigError
from ..identification.methods.base import modes_kept
from ..io.processes import Processes
from ..io.progress import Progress
from ..model.modules import state_of
from ..model.patch import patched, unpatched
from ..model.report import report
from ..tasks.answer import input_device
from .compare import check_counts, length_notes
from .forwards import answer_along, losses_along, output_head
from .measures import Mean, NextToken, SameTokens, mean_of, next_token, same_tokens
from .plan import DENSE, PATCHED, Variant, variants_of
from .prompt_set import Asked, prompt_set
from .prompt_set_table import lines
from .prompts import stops

Notes = dict[str, dict[str, None]]  # by variant, in the order they came


@dataclass(frozen=True)
class Run:
    """One prompt, run one way.

    Attributes:
        tokens, text: the greedy answer; no text without a tokenizer.
        nll: negative log-likelihood of the answer that all ways follow, in nats per token.
        cache_bytes: bytes the KV cache really held once the prompt was read.
        same: how far the greedy answer is dense's; ``next_token``: how alike both predict along the answer that they
            follow. None for dense.
    """

    tokens: tuple[int, ...]
    text: str | None
    nll: float
    cache_bytes: int
    same: SameTokens | None
    next_token: NextToken | None


@dataclass(frozen=True)
class Prompted:
    """One prompt, run every way.

    Attributes:
        prompt_tokens, answer_tokens: tokens of the prompt, and of the answer that all ways follow.
        given: whether that is the answer given with it; else it is dense's own greedy one.
        runs: by the name of the variant, dense first.
    """

    id: str
    prompt_tokens: int
    answer_tokens: int
    given: bool
    runs: Mapping[str, Run]

    def lost(self, variant: str = PATCHED) -> float:
        """NLL above dense's, in nats per token."""
        return self.runs[variant].nll - self.runs[DENSE].nll


@dataclass(frozen=True)
class Means:
    """One variant over all prompts, each of which counts once; intervals are of 95 %, by ``paired_bootstrap``.

    Attributes:
        retrieval_heads: KV heads that are retrieval heads.
        kept: what these do, in words.
        nll: mean, in nats per token; ``nll_lost`` is what it has above dense.
        agreement: share of the answer's tokens with the same most likely one; ``kl``: KL(dense || variant), in nats.
        equal: share of the prompts whose greedy answer is dense's.
        cache_share: bytes of all KV caches, of dense's.
    """

    retrieval_heads: int
    kept: str
    nll: float
    nll_lost: Mean
    agreement: Mean
    kl: Mean
    equal: Mean
    cache_share: float


@dataclass(frozen=True, repr=False)
class ComparedPrompts:
    """Dense against patched on a set of prompts. ``str()`` is a table, ``as_dict()`` plain data for JSON.

    Attributes:
        kv_heads: KV heads of the model.
        dense_nll: mean over the prompts, in nats per token.
        variants: by name, those of a sweep behind "patched"; ``swept`` has the values that it gave them.
        prompts: the worst first, by the NLL that "patched" has above dense, then by KL.
        notes: as in ``report``, by variant.
    """

    kv_heads: int
    dense_nll: float
    variants: Mapping[str, Means]
    swept: Mapping[str, Any]
    prompts: tuple[Prompted, ...]
    notes: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(lines(self))

    __repr__ = __str__  # what a notebook shows


def compare_prompts(
    model: nn.Module,
    prompts: str | Path | Sequence[Mapping[str, Any]],
    *,
    config: str | Path | dict | LongCtxConfig | None = None,
    tokenizer: Any = None,
    sweep: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    prefill_chunk_size: int | None = None,
    progress: bool = False,
    **sections: dict[str, Any],
) -> ComparedPrompts:
    """Run many prompts dense and patched, and say how far answers, predictions and likelihoods agree, worst first.

    The one model is patched and unpatched in turns, as in ``compare``, and is afterwards as it was. Where several
    processes were launched, each with the whole model, every one runs its share and gets the whole result.

    Args:
        model: as for ``patch_model``; patched or not.
        prompts: a file of JSON lines, or a list of such objects: ``prompt`` (text) or ``messages`` (of a chat), and
            where wanted ``answer`` (text) and ``id``. All ways follow the answer, token by token; without one they
            follow dense's greedy one.
        config: what to patch with, as for ``patch_model``; None: what the model is patched with, or else "auto".
        tokenizer: the model's.
        sweep: ``"retrieval_fraction=0.1,0.25"``: one more variant for each value of a field of the config.
        chat: every ``prompt`` is a user's message: the chat template goes around it.
        max_new_tokens: tokens of a greedy answer, at most.
        prefill_chunk_size: tokens of a prompt per forward, every way; None: all of them at once.
        progress: show how far it is on stderr: a bar, or where that is no terminal a line now and then.
        sections: overrides merged into the config, as for ``patch_model``.

    Raises:
        ConfigError: a line that is no prompt, by its number; a number out of bounds; or as ``patch_model``: all before
            anything is run. While it runs: a likelihood that is no number.
        UnsupportedModelError, UnsupportedModeError: as ``compare``.
    """
    cut = {} if prefill_chunk_size is None else {"prefill_chunk_size": (prefill_chunk_size, 1)}
    check_counts(max_new_tokens=(max_new_tokens, 1), **cut)
    state = state_of(model)
    if config is None:
        config = "auto" if state is None else state.config
    asked = prompt_set(model, prompts, tokenizer, chat)
    with modes_kept(model), unpatched(model), torch.no_grad():
        model.eval()
        with patched(model, config, **sections):
            settings = state_of(model).config
        variants = variants_of(model, settings, sweep)
        processes = Processes(input_device(model))
        runner = _Runner(model, output_head(model), tokenizer, max_new_tokens, prefill_chunk_size, {})
        mine = asked[processes.rank :: processes.count]
        with Progress("compare", len(mine) * len(variants), "runs", shown=progress and processes.main) as bar:
            own = [runner.prompted(one, variants, bar.advance) for one in mine]
        done, notes = _together(processes.gather((own, runner.notes)))
    too_long = length_notes(model, max(one.prompt_tokens for one in done) + max_new_tokens)
    return ComparedPrompts(
        kv_heads=settings.kv_heads,
        dense_nll=sum(one.runs[DENSE].nll for one in done) / len(done),
        variants={one.name: _means(done, one) for one in variants[1:]},
        swept={one.name: one.swept for one in variants if one.swept is not None},
        prompts=tuple(sorted(done, key=lambda one: (-one.lost(), -one.runs[PATCHED].next_token.kl))),
        notes={name: found for name, said in notes.items() if (found := (*too_long, *said))},
    )


def _together(shares: Sequence[tuple[list[Prompted], Notes]]) -> tuple[list[Prompted], Notes]:
    """The prompts of all processes, each of which had every n-th, in their order; and the notes of all."""
    done = [one for row in zip_longest(*(prompted for prompted, _ in shares)) for one in row if one is not None]
    notes: Notes = {}
    for _, said in shares:
        for name, found in said.items():
            notes.setdefault(name, {}).update(found)
    return done, notes


@dataclass
class _Runner:
    """Runs prompts. ``head`` makes logits of hidden states; ``notes`` are those of the reports so far."""

    model: nn.Module
    head: Callable[[Tensor], Tensor]
    tokenizer: Any
    most: int
    chunk: int | None
    notes: Notes

    def prompted(self, one: Asked, variants: Sequence[Variant], advance: Callable[[], None]) -> Prompted:
        """One prompt every way; dense goes first, because the others follow what it says."""
        stop = stops(self.model)
        along = one.answer
        runs: dict[str, Run] = {}
        base: Tensor | None = None
        for variant in variants:
            with nullcontext() if variant.config is None else patched(self.model, variant.config):
                tokens, held, states = answer_along(self.model, self.head, one.ids, self.most, stop, self.chunk, along)
                if variant.config is not None:
                    self.notes.setdefault(variant.name, {}).update(dict.fromkeys(report(self.model).notes))
                along = one.ids.new_tensor(tokens) if along is None else along
                nll = losses_along(self.model, self.head, states, along).sum().item()
            if not math.isfinite(nll):
                raise ConfigError(f"prompt {one.id}: the NLL of its answer is {nll} ({variant.name}).")
            base = states if base is None else base
            other = runs.get(DENSE)
            runs[variant.name] = Run(
                tokens=tuple(tokens),
                text=None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True),
                nll=nll / len(along),
                cache_bytes=held,
                same=None if other is None else same_tokens(other.tokens, tokens),
                next_token=None if other is None else next_token(base, states, self.head),
            )
            advance()
        return Prompted(one.id, one.ids.shape[1], len(along), one.answer is not None, runs)


def _means(done: Sequence[Prompted], variant: Variant) -> Means:
    own = [one.runs[variant.name] for one in done]
    dense = [one.runs[DENSE] for one in done]
    return Means(
        retrieval_heads=variant.config.retrieval_heads,
        kept=variant.config.kept,
        nll=sum(run.nll for run in own) / len(own),
        nll_lost=mean_of([one.lost(variant.name) for one in done]),
        agreement=mean_of([run.next_token.agreement for run in own]),
        kl=mean_of([run.next_token.kl for run in own]),
        equal=mean_of([run.same.prefix == run.same.compared for run in own]),
        cache_share=sum(run.cache_bytes for run in own) / sum(run.cache_bytes for run in dense),
    )
