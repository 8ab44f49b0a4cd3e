"""``compare``: dense against patched on one prompt of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ..config.config import LongCtxConfig
from ..config.model import made_for
from ..errors import ConfigError
from ..identification.methods.base import modes_kept
from ..io.progress import Progress
from ..model.modules import state_of, unwrap
from ..model.patch import patched, unpatched
from ..model.report import report
from .forwards import Answer, forced, greedy, output_head
from .measures import NextToken, SameTokens, next_token, same_tokens
from .prompts import Prompt, stops, token_ids

SHOWN = 60  # characters of each answer in the table


@dataclass(frozen=True)
class Side:
    """One way of running the model.

    Attributes:
        tokens: the greedy answer, the token that ended it included.
        text: the answer in words, None without a tokenizer.
        rest: its words from where the two answers part; None where they are equal, or without a tokenizer.
        cache_bytes: bytes the KV cache really held once the prompt was read.
        prefill_s: seconds until the first token was known, median over the rounds; None for no rounds.
        decode_ms: milliseconds for each token after it, likewise; None for an answer of one token too.
    """

    tokens: tuple[int, ...]
    text: str | None
    rest: str | None
    cache_bytes: int
    prefill_s: float | None
    decode_ms: float | None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Dense against patched on one prompt. ``str()`` is a short table, ``as_dict()`` plain data for JSON.

    Attributes:
        prompt_tokens: tokens of the prompt.
        kv_heads, retrieval_heads: KV heads of the model, and those of them that are retrieval heads when patched.
        kept: what these do, in words.
        dense, patched: what each way gave.
        same: how far the two answers are the same.
        prompt: the next token over the end of the prompt; None for a prompt of one token.
        answer: the next token along the dense answer, which both ways were made to follow.
        kernels, notes: as in ``report``.
        rounds: timed runs of either way, in turns, after one that is not timed.
    """

    prompt_tokens: int
    kv_heads: int
    retrieval_heads: int
    kept: str
    dense: Side
    patched: Side
    same: SameTokens
    prompt: NextToken | None
    answer: NextToken
    kernels: tuple[str, ...]
    notes: tuple[str, ...]
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        a = self.dense
        b = self.patched
        lines = [
            f"prompt         {self.prompt_tokens} tokens; patched, {self.retrieval_heads} of {self.kv_heads} KV heads "
            f"{self.kept}",
            f"{'':<14} {'dense':>10} {'patched':>10}",
            _row("answer tokens", len(a.tokens), len(b.tokens), "d"),
            _row("KV cache MB", a.cache_bytes / 1e6, b.cache_bytes / 1e6, ".2f")
            + f"   {b.cache_bytes / a.cache_bytes:.0%} once the prompt is read",
            *([_row("prefill s", a.prefill_s, b.prefill_s, ".3f")] if self.rounds else []),
            *([_row("decode ms", a.decode_ms, b.decode_ms, ".1f") + "   per token"] if self.rounds else []),
            *self._answers(),
        ]
        for name, found in (("end of prompt", self.prompt), ("dense answer", self.answer)):
            if found is not None:
                lines.append(
                    f"{name:<14} next token the same at {found.agreement:.1%} of {found.positions} positions, "
                    f"KL(dense || patched) {found.kl:.2g} nats, at most {found.kl_max:.2g}"
                )
        if self.rounds:
            rounds = f"medians of {self.rounds} runs each" if self.rounds > 1 else "one run each"
            lines.append(f"times          {rounds}, of one prompt: indicative, `hf-longctx bench` measures")
        lines += [f"note           {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows

    def _answers(self) -> list[str]:
        if self.same.prefix == self.same.compared:
            return [f"answers        equal{_quoted(self.dense.text)}"]
        said = f"part after {self.same.prefix} tokens, equal at {self.same.equal:.0%} of {self.same.compared} positions"
        sides = {"dense": self.dense, "patched": self.patched}
        rests = [f"  {name:<12}{_quoted(side.rest)}" for name, side in sides.items() if side.rest is not None]
        return [f"answers        {said}", *rests]


def compare(
    model: nn.Module,
    prompt: Prompt,
    *,
    config: str | Path | dict | LongCtxConfig | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    prompt_positions: int = 256,
    rounds: int = 3,
    prefill_chunk_size: int | None = None,
    progress: bool = False,
    **sections: dict[str, Any],
) -> Comparison:
    """Run one prompt dense and patched, and say how far the answers and the predictions agree, and what each costs.

    The one model is patched and unpatched in turns, so its weights are in memory once. Afterwards it is as it was:
    patched by the same config, or not, in the same mode, also after an exception. Answers are greedy: sampling and
    penalties of the model's generation_config play no part, its eos_token_id ends an answer.

    Args:
        model: as for ``patch_model``; patched or not.
        prompt: a text, the messages of a chat (both need ``tokenizer``), or token ids, ``[T]`` or ``[1, T]``. A text
            gets the tokenizer's special tokens, unless it already begins with its bos token.
        config: what to patch with, as for ``patch_model``; None: what the model is patched with, or else "auto".
        tokenizer: the model's.
        max_new_tokens: tokens of an answer, at most.
        prompt_positions: tokens at the end of the prompt whose prediction is compared.
        rounds: timed runs of either way, in turns; 0 measures no times.
        prefill_chunk_size: tokens of the prompt per forward, both ways; None: all of them at once.
        progress: show how far it is on stderr: a bar, or where that is no terminal a line now and then.
        sections: overrides merged into the config, as for ``patch_model``.

    Raises:
        ConfigError: a prompt that cannot be read, a number out of bounds, or as ``patch_model``.
        UnsupportedModelError: as ``patch_model``, or the model's logits are not its output embedding's.
        UnsupportedModeError: as ``patch_model``.
    """
    check_counts(
        max_new_tokens=(max_new_tokens, 1),
        prompt_positions=(prompt_positions, 0),
        rounds=(rounds, 0),
        **({} if prefill_chunk_size is None else {"prefill_chunk_size": (prefill_chunk_size, 1)}),
    )
    state = state_of(model)
    if config is None:
        config = "auto" if state is None else state.config
    ids = token_ids(model, prompt, tokenizer)
    stop = stops(model)
    last = min(prompt_positions, ids.shape[1] - 1)
    with modes_kept(model), unpatched(model), torch.no_grad():
        model.eval()
        with patched(model, config, **sections):
            settings = state_of(model).config  # found once, and before minutes are spent

        def way(name: str) -> AbstractContextManager:
            return patched(model, settings) if name == "patched" else nullcontext()

        def run(name: str) -> Answer:
            with way(name):
                return greedy(model, ids, max_new_tokens, stop, prefill_chunk_size)

        head = output_head(model)
        with Progress("compare", 4 + 2 * rounds, "runs", shown=progress) as bar:
            first = {}
            for name in ("dense", "patched"):
                first[name] = run(name)
                bar.advance()
            answer = ids.new_tensor(first["dense"].tokens)
            dense_states = forced(model, ids, answer, last, prefill_chunk_size)
            bar.advance()
            with way("patched"):
                states = forced(model, ids, answer, last, prefill_chunk_size)
                told = report(model)
            bar.advance()
            times: dict[str, list[Answer]] = {name: [] for name in first}
            for number in range(rounds):
                for name in (list(times), list(reversed(times)))[number % 2]:
                    times[name].append(run(name))
                    bar.advance()
        on_prompt = next_token(dense_states[:last], states[:last], head) if last else None
        on_answer = next_token(dense_states[last:], states[last:], head)
    same = same_tokens(first["dense"].tokens, first["patched"].tokens)
    sides = {name: _side(first[name], times[name], same, tokenizer) for name in first}
    return Comparison(
        prompt_tokens=ids.shape[1],
        kv_heads=told.kv_heads,
        retrieval_heads=told.retrieval_heads,
        kept=told.kept,
        same=same,
        prompt=on_prompt,
        answer=on_answer,
        kernels=told.kernels,
        notes=(*length_notes(model, ids.shape[1] + max_new_tokens), *told.notes),
        rounds=rounds,
        **sides,
    )


def check_counts(**counts: tuple[int, int]) -> None:
    """Refuse numbers below their bound: (given, least) by name.

    Raises:
        ConfigError: one of them is below, or no whole number.
    """
    for name, (given, bound) in counts.items():
        if type(given) is not int or given < bound:
            raise ConfigError(f"{name} must be a whole number of at least {bound}, given {given!r}.")


def _side(first: Answer, timed: list[Answer], same: SameTokens, tokenizer: Any) -> Side:
    def words(tokens: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    decode = [answer.decode_ms for answer in timed if answer.decode_ms is not None]
    return Side(
        tokens=first.tokens,
        text=words(first.tokens),
        rest=words(first.tokens[same.prefix :]) if same.prefix < same.compared else None,
        cache_bytes=first.cache_bytes,
        prefill_s=median(answer.prefill_s for answer in timed) if timed else None,
        decode_ms=median(decode) if decode else None,
    )


def length_notes(model: nn.Module, tokens: int) -> list[str]:
    """What to say of a prompt and its answer that are longer than the model was made for."""
    longest = made_for(unwrap(model).config)
    if longest is None or tokens <= longest:
        return []
    return [f"prompt and answer may reach {tokens} tokens, the model was made for {longest}: both ways may be wrong"]


def _row(name: str, dense: float | None, patched: float | None, form: str) -> str:
    cells = ("-" if value is None else format(value, form) for value in (dense, patched))
    return f"{name:<14}" + "".join(f" {cell:>10}" for cell in cells)


def _quoted(text: str | None) -> str:
    if text is None:
        return ""
    return f" {text if len(text) <= SHOWN else text[:SHOWN] + '...'!r}"
