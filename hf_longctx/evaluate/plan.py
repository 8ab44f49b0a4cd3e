"""What an evaluation runs: every variant on every case. All of it is checked before the first one runs."""

from __future__ import annotations

import dataclasses
import typing
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..config import strict_yaml
from ..config.config import LongCtxConfig
from ..config.words import near, short, spec_word
from ..errors import ConfigError
from ..model.modules import state_of
from ..model.patch import patched
from ..tasks import ANSWERS, MODES
from ..tasks.base import DEPTH, LENGTH, SEED, Sample, Task
from ..tasks.language import Language
from .forwards import windows

DENSE = "dense"
PATCHED = "patched"
EVICTED = {"store": "evicted"}
BUDGET = ["stores", "retrieval", "budget"]
FIXED = "model"  # the section that says which model a config fits


@dataclass(frozen=True)
class Options:
    """What is varied, and how often.

    Attributes:
        lengths: tokens of a prompt, its question included; of the user's own texts the most that a prompt may have.
        depths: where in the context the facts stand that are asked for, 0 the beginning; none: anywhere. Tasks that
            count over the whole context have no depth and are run once per length and sample.
        samples: prompts per task, length and depth; of the user's own texts at most so many.
        seed: random seed.
        mode: how the questions about one context are asked, "requests" or "turns" as in ``tasks.answer``.
        answers: "greedy": decoded, and the expected answers' likelihood beside them. "forced": that alone, nothing is
            decoded; an answer is right where each of its tokens is the greedy choice.
        prefill_chunk_size: tokens of a context per forward; None: all of them at once.
        perplexity_window: tokens that a token of the perplexity text is predicted in; None: the longest of ``lengths``.
    """

    lengths: tuple[int, ...] = field(metadata=LENGTH)
    depths: tuple[float, ...] = field(default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata=DEPTH)
    samples: int = field(default=8, metadata={"min": 1, "max": 2**31, "unit": "prompts"})
    seed: int = field(default=0, metadata=SEED)
    mode: str = field(default="requests", metadata={"choices": MODES})
    answers: str = field(default="greedy", metadata={"choices": ANSWERS})
    prefill_chunk_size: int | None = field(default=None, metadata=LENGTH)
    perplexity_window: int | None = field(default=None, metadata={**LENGTH, "min": 2})

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError("lengths: none given, expected tokens of a prompt, e.g. 512,2048.")
        for name in ("lengths", "depths"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"{name}: got {', '.join(map(str, given))}; one of them is given twice.")


@dataclass(frozen=True)
class Variant:
    """One way of running the model: dense where ``config`` is None. ``swept`` is the value that a sweep gave it."""

    name: str
    config: LongCtxConfig | None = None
    swept: Any = None


@dataclass(frozen=True)
class Case:
    """One prompt, which every variant answers.

    ``seed`` is that of the run; of the user's own texts it is the text's, as ``make`` takes it.
    """

    task: Task
    length: int
    depth: float | None
    number: int
    seed: int

    @property
    def key(self) -> str:
        """What it is called in the records."""
        return f"{self.task.name} length={self.length} depth={self.depth} sample={self.number}"

    def sample(self, language: Language) -> Sample:
        """The prompt: its draw depends on the seed, the task, the length, the depth and the number alone."""
        if self.task.own:
            return self.task.make(language, self.length, self.depth, self.seed)
        depth = 0 if self.depth is None else 1 + round(self.depth * 10**6)
        # The task's own word is part of every draw; its fields are not, and would else get the same facts and filler.
        fields = self.task.name.partition(":")[2]
        own = [zlib.crc32(fields.encode())] if fields else []
        draw = np.random.default_rng([self.seed, self.number, self.length, depth, *own]).integers(SEED["max"])
        return self.task.make(language, self.length, self.depth, int(draw))


@dataclass(frozen=True)
class Window:
    """One window of the perplexity text: tokens ``scored`` to ``end`` are predicted from those since ``begin``."""

    begin: int
    scored: int
    end: int

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.end - self.begin

    @property
    def key(self) -> str:
        """What it is called in the records."""
        return f"text {self.begin}:{self.scored}:{self.end}"


@dataclass(frozen=True)
class EvalPlan:
    """Everything that is run, short cases first, so that the first results are there early.

    ``notes`` say per task what became of the user's own texts.
    """

    variants: tuple[Variant, ...]
    cases: tuple[Case | Window, ...]
    options: Options
    text: Tensor | None = None
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def keys(self) -> set[tuple[str, str]]:
        """(variant, case) of every record."""
        return {(variant.name, case.key) for case in self.cases for variant in self.variants}


def make_plan(
    model: nn.Module,
    language: Language,
    tasks: Sequence[Task],
    options: Options,
    config: Any,
    sweep: str | None = None,
    text: Tensor | None = None,
) -> EvalPlan:
    """The plan of a run; nothing is left that could turn out to be wrong after hours.

    Args:
        model: not patched; it is patched by every variant's config once, to see that it can be.
        config: as for ``patch_model``.
        sweep: ``FIELD=VALUE,VALUE``, a field of the config and what it is set to, one variant each.
        text: token ids ``[T]`` of the perplexity text.

    Raises:
        ConfigError: the tasks cannot be said in this language or at these lengths and depths, a value or field of the
            sweep does not fit, or the text is too short.
        UnsupportedModelError, UnsupportedModeError: as ``patch_model``.
    """
    if text is None and options.perplexity_window is not None:
        raise ConfigError("perplexity_window: there is no text for it; give perplexity a file as well.")
    cases: list[Case | Window] = _checked(tasks, options, language)
    notes = {}
    for task in tasks:
        if task.own:
            chosen = task.chosen(language, options.lengths, options.samples, options.seed)
            cases += own_cases(task, chosen)
            notes[task.name] = task.notes(language, chosen, options.samples)
    if text is not None:
        if len(text) < 2:
            raise ConfigError("perplexity: the text has fewer than 2 tokens; nothing in it can be predicted.")
        size = min(options.perplexity_window or max(options.lengths), len(text))
        cases += [Window(*one) for one in windows(len(text), size, size // 2)]
    cases.sort(key=lambda case: case.length)
    return EvalPlan(variants_of(model, config, sweep), tuple(cases), options, text, notes)


def _checked(tasks: Sequence[Task], options: Options, language: Language) -> list[Case]:
    """Every prompt that is drawn; those are tried that are most likely to have no room."""
    drawn = [task for task in tasks if not task.own]
    cases = list(cases_of(drawn, options)) if drawn else []
    # The shortest has the least room, and of the longest a language may have too few words.
    first = {(case.task, case.depth): case for case in reversed(cases)}
    for case in {*first.values(), *{case.task: case for case in cases}.values()}:
        case.sample(language)
    for task in drawn:
        shortest = [case for case in cases if case.task == task and case.length == min(options.lengths)]
        if _is_tight(shortest[0], language):
            for case in shortest:
                case.sample(language)
    return cases


def _is_tight(case: Case, language: Language) -> bool:
    """Whether a case has hardly any room, so that another draw, with longer words, may have none."""
    try:
        dataclasses.replace(case, length=7 * case.length // 8).sample(language)
    except ConfigError:
        return True
    return False


def cases_of(tasks: Sequence[Task], options: Options) -> Iterator[Case]:
    """Every prompt; all tasks and depths of a sample number before the next number."""
    for length in sorted(options.lengths):
        for number in range(options.samples):
            for task in tasks:
                for depth in (options.depths if task.deep else ()) or (None,):
                    yield Case(task, length, depth, number, options.seed)


def own_cases(task: Task, chosen: Mapping[int, Sequence[int]]) -> Iterator[Case]:
    """A prompt for each of the seeds that ``OwnTask.chosen`` found for a length."""
    for length, seeds in chosen.items():
        for number, seed in enumerate(seeds):
            yield Case(task, length, None, number, seed)


def variants_of(model: nn.Module, config: Any, sweep: str | None) -> tuple[Variant, ...]:
    """Dense, patched, and one variant per value of the sweep; patched is one of those where it has its value."""
    own = _patchable(model, config)
    found = [Variant(DENSE)]
    swept = list(values_of(sweep)) if sweep is not None else []
    _check_budgets(own, swept)
    for name, value, override in swept:
        config = _patchable(model, own.override(**override))
        if same := next((one.name for one in found if one.config == config), None):
            raise ConfigError(f"sweep: {name} gives the same config as {same}; leave one of them out.")
        found.append(Variant(name, config, value))
    here = next((i for i, one in enumerate(found) if one.config == own), None)
    patched_one = Variant(PATCHED, own, None if here is None else found.pop(here).swept)
    return (found[0], patched_one, *found[1:])


def _check_budgets(config: LongCtxConfig, swept: Sequence[tuple[str, Any, Mapping[str, Any]]]) -> None:
    """Refuse budgets of an eviction for retrieval heads that have another store than every token as it is."""
    store = spec_word(config.stores.retrieval)
    for name, _, override in swept:
        given = override.get("stores", {}).get("retrieval", {})
        if EVICTED.items() <= given.items() and store not in ("full", EVICTED["store"]):
            raise ConfigError(
                f"sweep: {name} is a budget of evictions, and stores.retrieval of the config is {store!r}. Give it "
                "store: evicted in a YAML of yours (what is left may be quantized: keep)."
            )


def _patchable(model: nn.Module, config: Any) -> LongCtxConfig:
    with patched(model, config):
        return state_of(model).config


def values_of(sweep: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, value, override) of every value of ``retrieval_fraction=0.1,0.25``; values are read as YAML reads them.

    The field is a dotted path from a section on, or the name of a field that only one section has. ``budget`` is that
    of ``store: evicted``, which retrieval heads get where they have none: a whole number above 1 is tokens, any other
    number a share of the prompt.

    Raises:
        ConfigError: it does not have that form, or no section has such a field.
    """
    field_name, _, said = sweep.partition("=")
    values = listed(said, f"sweep: {field_name}", "retrieval_fraction=0.1,0.25")
    path = _path(field_name.strip())
    for value in values:
        override = value if path != BUDGET else _budget(value)
        for part in reversed(path):
            override = {part: override}
        if path == BUDGET:
            override["stores"]["retrieval"] |= EVICTED
        yield f"{field_name.strip()}={value}", value, override


def _budget(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return {"tokens": value} if isinstance(value, int) and value > 1 else {"share": float(value)}


def _path(name: str) -> list[str]:
    if name == BUDGET[-1]:
        return BUDGET
    hints = {key: hint for key, hint in typing.get_type_hints(LongCtxConfig).items() if key != FIXED}
    parts = name.split(".")
    if parts[0] in hints:
        return parts
    fields = {key: [f.name for f in dataclasses.fields(hint)] for key, hint in hints.items() if hint is not str}
    holding = [key for key, names in fields.items() if name in names]
    if len(holding) == 1:
        return [holding[0], name]
    known = [one for names in fields.values() for one in names]
    raise ConfigError(
        f"sweep: {name!r} is {'in ' + ' and '.join(holding) if holding else 'no field of a section'}; give its path, "
        f"e.g. stores.streaming.recent=64,256. Sections: {', '.join(hints)}.{'' if holding else near(name, known)}"
    )


def listed(text: str, where: str, example: str) -> list[Any]:
    """The values of ``512,2048``, each read as YAML reads it.

    Raises:
        ConfigError: there are none, or this is no such list.
    """
    try:
        values = strict_yaml.read(f"[{text}]", where)
    except ConfigError:
        values = None
    if not isinstance(values, list) or not values or any(value is None for value in values):
        raise ConfigError(f"{where}: got {short(text)}, expected values with commas between them, e.g. {example}.")
    return values
