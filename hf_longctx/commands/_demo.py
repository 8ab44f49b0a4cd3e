"""``hf-longctx demo``: a small trained model answers the same questions dense, patched, and patched wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mean, median

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..assets import asset
from ..cache.cache import cache_bytes
from ..cache.seam import CACHE, cache_of
from ..config.config import LongCtxConfig
from ..errors import ConfigError
from ..io.console import count, tables
from ..io.progress import Progress
from ..model.loading import AutoModelForCausalLM
from ..model.modules import state_of
from ..model.patch import patch_model, unpatch_model
from ..tasks.tiny_language import BLOCK, NOTE, Filler, exam
from ._options import no_bars

MODEL = "tiny-llama"
# tokens of "ask amber falcon is" and of its answer
ASKED = 4
ANSWER = 4


@dataclass
class Way:
    """One way of running the model, and what was measured: one number per prompt, but hits and NLL per question.

    Attributes:
        retrieval: in words how many KV heads keep every token.
        nll: negative log-likelihood of the expected answer, in nats per token; where it is measured.
    """

    name: str
    retrieval: str
    config: LongCtxConfig | None
    hits: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        return mean(self.hits)


EXACT_MATCH = {"exact match": lambda way: f"{way.exact_match:.3f}"}


def ways(model: nn.Module, config: str = "auto") -> list[Way]:
    """Dense; the head roles of a config; and as many streaming heads, but the heads that matter most among them.

    Raises:
        ConfigError: there is no such config, or it has no scores of its heads.
        UnsupportedModelError: the model cannot be patched.
    """
    patch_model(model, config)
    right = state_of(model).config
    unpatch_model(model)
    scores = right.heads.active.scores
    if scores is None:
        raise ConfigError(
            f"config: got {config!r}, whose heads have roles and no scores, so nothing says which heads are the wrong "
            "ones. Measure them: hf-longctx identify MODEL --out my.yaml, then --config my.yaml."
        )
    upside_down = tuple(tuple(-score for score in row) for row in scores)
    wrong = right.override(heads={"scores": upside_down, "confidence": right.heads.confidence})
    every = f"{right.kv_heads} of {right.kv_heads}"
    chosen = f"{right.retrieval_heads} of {right.kv_heads}"
    return [Way("dense", every, None), Way("patched", chosen, right), Way("wrong heads", chosen, wrong)]


def texts(seed: int, prompts: int, length: int, notes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (text ``[1, length - 9]``, questions ``[notes, 4]``, answers ``[notes, 4]``)."""
    filler = Filler()
    rng = np.random.default_rng(seed)
    for _ in range(prompts):
        ids, where = exam(rng, filler, 1, length - BLOCK + BLOCK * notes, notes)
        ids = torch.from_numpy(ids)
        where = torch.from_numpy(where[0])
        questions = torch.stack([ids[0, first - ASKED : first] for first in where[:, 0]])
        yield ids[:, : length - BLOCK], questions, ids[0][where]


@torch.no_grad()
def ask(model: nn.Module, way: Way, text: Tensor, questions: Tensor, answers: Tensor) -> None:
    """Read the text once, then answer all its questions from copies of its cache."""
    start = time.perf_counter()
    cache = cache_of(model(text, logits_to_keep=1))
    way.prefill.append(time.perf_counter() - start)
    way.megabytes.append(cache_bytes(cache) / 1e6)
    cache.batch_repeat_interleave(len(questions))
    prompt = torch.cat([text.expand(len(questions), -1), questions], 1)
    start = time.perf_counter()
    out = model.generate(prompt, **{CACHE: cache}, max_new_tokens=ANSWER, do_sample=False)
    way.decode.append((time.perf_counter() - start) / ANSWER)
    way.hits += (out[:, -ANSWER:] == answers).all(-1).tolist()


def run(
    length: int = 4096, notes: int = 16, prompts: int = 13, seed: int = 2024, console: Console | None = None
) -> list[Way]:
    """Measure all ways on the same prompts, and print the table if a console is given.

    Args:
        length: tokens of a prompt with its question.
        notes: notes hidden in a prompt, and questions asked about it.
        prompts: number of prompts.

    Returns:
        The ways, dense first.
    """
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(asset(MODEL), longctx=False).eval()
    model.generation_config.eos_token_id = None  # every answer has four words
    compared = ways(model)
    with Progress("demo", prompts * len(compared), "prompts and ways", shown=console is not None) as bar:
        for text, questions, answers in texts(seed, prompts, length, notes):
            for way in compared:
                if way.config is not None:
                    patch_model(model, way.config)
                ask(model, way, text, questions, answers)
                unpatch_model(model)
                bar.advance()
    if console is not None:
        tokenizer = AutoTokenizer.from_pretrained(asset(MODEL))
        console.print(f"\nA prompt of {length} words hides {notes} notes, like this one:")
        console.print(f"  ... {tokenizer.decode(hidden_note(text[0]))} ...", style="cyan")
        console.print(f"and then asks: [cyan]{tokenizer.decode(questions[0])}[/] -> {tokenizer.decode(answers[0])}\n")
        title = (
            f"{notes * prompts} questions about {length}-token prompts, {notes} answered at once, "
            f"{count(torch.get_num_threads(), 'CPU thread')}"
        )
        show(console, compared, title)
    return compared


def hidden_note(text: Tensor) -> Tensor:
    """The first note of a text with two words on either side."""
    at = int((text == NOTE).nonzero()[0])
    return text[max(1, at - 2) : at + BLOCK + 2]


def show(
    console: Console, compared: list[Way], title: str, scores: Mapping[str, Callable[[Way], str]] = EXACT_MATCH
) -> None:
    """The table, and one sentence that says what it means.

    Args:
        scores: headings of how right the answers are, and what stands under them.
    """
    columns = {
        "": lambda way: way.name,
        "retrieval heads": lambda way: way.retrieval,
        **scores,
        "KV cache MB": lambda way: f"{mean(way.megabytes):.2f}",
        "prefill s": lambda way: f"{median(way.prefill):.2f}",
        "decode ms/token": lambda way: f"{1000 * median(way.decode):.0f}",
    }
    rows = [[cell(way) for cell in columns.values()] for way in compared]
    for table in tables(title, list(columns), rows, console.width):
        console.print(table)
    dense, right, wrong = compared
    share = mean(right.megabytes) / mean(dense.megabytes)
    console.print(
        f"\nThe patched model answers {right.exact_match:.1%} of the questions right (dense: {dense.exact_match:.1%}) "
        f"with {share:.0%} of the memory, because only the heads that look far back keep the whole text; let the wrong "
        f"heads forget, and {wrong.exact_match:.1%} are left."
    )
