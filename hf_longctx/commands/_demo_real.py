"""``hf-longctx demo --real``: a real checkpoint reads a book with facts hidden in it, and is asked for them."""

from __future__ import annotations

from statistics import mean

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from ..assets import OWNER, REAL, embedded
from ..cache.cache import cache_bytes
from ..errors import ConfigError
from ..evaluate.meter import Meter
from ..io.console import count
from ..io.progress import Progress
from ..model.patch import patch_model, unpatch_model
from ..tasks import task_from
from ..tasks.answer import ask_all, score
from ..tasks.base import Question, Sample
from ..tasks.forced import forced_over
from ..tasks.haystack import is_tiny_language
from ..tasks.language import Language, language_for
from ._demo import Way, show, ways
from ._options import device_of, load_model

MODEL = f"{OWNER}/{REAL}"
TASK = "facts:facts={}"
HAYSTACK = "book"
WARM = 256  # tokens that every way reads before its time is taken
SHORT = 44  # characters of an answer that are shown
SPARE = 4  # tokens that an answer may have beside those of the expected one
EITHER_SIDE = 24  # tokens of the book around the fact that is shown

SCORES = {
    "right answers": lambda way: f"{sum(way.hits)} of {len(way.hits)}",
    "NLL per token": lambda way: f"{mean(way.nll):.3f}",
}


def run(
    length: int = 4096,
    notes: int = 4,
    prompts: int = 3,
    seed: int = 2024,
    model: str = MODEL,
    config: str = "auto",
    console: Console | None = None,
) -> list[Way]:
    """Measure all ways on the same prompts; print the answers and the table if a console is given.

    Args:
        length: tokens of a document with its longest question.
        notes: facts hidden in a document, and questions asked about it.
        prompts: number of documents.
        model: hub id, folder, or a name of ours.
        config: what to patch with; its scores are also what the wrong heads are chosen by.

    Returns:
        The ways, dense first.

    Raises:
        ConfigError: no such model or config, or one whose heads have no scores; or the documents cannot be made.
        UnsupportedModelError: the model cannot be patched.
    """
    loaded, tokenizer = load_model(embedded(model), "auto", device_of(None))
    if is_tiny_language(tokenizer):
        raise ConfigError(f"--model: {model} knows a language of notes and no English; hf-longctx demo shows it.")
    language = language_for(tokenizer, haystack=HAYSTACK, chat=bool(tokenizer.chat_template))
    task = task_from(TASK.format(notes))
    samples = [task.make(language, length, seed=seed + i) for i in range(prompts)]
    compared = ways(loaded, config)
    said: list[list[str]] = []
    with Progress("demo", prompts * len(compared), "prompts and ways", shown=console is not None) as bar:
        for sample in samples:
            for way in compared:
                said.append(ask(loaded, way, language, sample, first=sample is samples[0]))
                bar.advance()
    if console is not None:
        tell(console, language, samples[0], compared, said[: len(compared)])
        title = (
            f"{count(notes * prompts, 'question')} about {count(prompts, 'document')} of {length} tokens, "
            f"{count(torch.get_num_threads(), 'CPU thread')}"
        )
        show(console, compared, title, SCORES)
    return compared


def ask(model: nn.Module, way: Way, language: Language, sample: Sample, first: bool) -> list[str]:
    """Read the document once, then answer each of its questions from a copy of its cache; the texts of the answers.

    Args:
        first: nothing was read in this way before.
    """
    if way.config is not None:
        patch_model(model, way.config)
    room = SPARE + max(len(question.target) for question in sample.questions)
    try:
        if first:
            Meter(model, sample.stop, None).read(sample.context[:WARM])
        meter = Meter(model, sample.stop, None)
        with torch.no_grad():
            meter.read(sample.context)
            held = cache_bytes(meter.cache)
            said = [language.decode(ids) for ids in ask_all(meter, sample, "requests", room)]
            forced = forced_over(model, sample, meter.cache)
    finally:
        unpatch_model(model)
    costs = meter.costs(held)
    way.hits += [one == 1 for one in score(sample.questions, said)]
    way.nll += [one.nll / one.tokens for one in forced]
    way.megabytes.append(held / 1e6)
    way.prefill.append(costs.prefill_s)
    way.decode.append(costs.decode_ms / 1000)
    return said


def tell(console: Console, language: Language, sample: Sample, compared: list[Way], said: list[list[str]]) -> None:
    """One of the facts where it is hidden, and every question about this document with the answers of all ways."""
    begin, end = sample.needles[0]
    around = language.decode(sample.context[max(0, begin - EITHER_SIDE) : end + EITHER_SIDE])
    facts = count(len(sample.questions), "fact")
    plain = {"markup": False, "highlight": False}
    console.print(f"\nA document of {sample.length} tokens hides {facts}, like this one:", **plain)
    console.print(f"  ... {one_line(around)} ...", style="cyan", **plain)
    console.print("Each is asked for, of a copy of the document's cache:", **plain)
    wide = max(len(way.name) for way in compared)
    for number, question in enumerate(sample.questions):
        console.print(f"\n{asked(language, question)}", style="cyan", **plain)
        console.print(f"  {'expected':{wide}}         {', '.join(question.answers)}", **plain)
        for way, texts in zip(compared, said, strict=True):
            mark = "[green]right[/]" if question.score(texts[number]) == 1 else "[red]wrong[/]"
            answer = escape(one_line(texts[number], SHORT))
            console.print(f"  {way.name:{wide}}  {mark}  {answer}", highlight=False)
    console.print()


def asked(language: Language, question: Question) -> str:
    """The question as a person would put it: without the chat's marks and the beginning of the answer."""
    ids, marks = question.prompt.tolist(), list(getattr(language, "suffix", ()))
    ends = (i for i in range(len(ids)) if marks and ids[i : i + len(marks)] == marks)
    return one_line(language.decode(ids[: next(ends, len(ids))]))


def one_line(text: str, most: int | None = None) -> str:
    """A text on one line, ``most`` characters of it at most and no word cut where that can be."""
    line = " ".join(text.split())
    if most is None or len(line) <= most:
        return line
    return f"{line[:most].rpartition(' ')[0] or line[:most]} ..."
