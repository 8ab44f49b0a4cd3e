"""Every key of a config means something: a changed value changes the plan of a layer, or is refused.

The keys are the fields of the dataclasses. What is free of meaning for the run says so in its metadata and its docs.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import types
import typing
from dataclasses import dataclass, field
from functools import cache

import pytest
from helpers.config_cases import SCORES, refused
from helpers.tiny import tiny_model

from hf_longctx import ConfigError, LongCtxConfig, patch_model, unpatch_model
from hf_longctx.config import sections as config_sections
from hf_longctx.config import words as registry
from hf_longctx.config.model import ModelSection
from hf_longctx.config.reference import meanings
from hf_longctx.config.words import load, words
from hf_longctx.decode.base import Select, SelectSpec
from hf_longctx.model.modules import state_of
from hf_longctx.prefill.base import PatternSpec

FOLDERS = {"stores": "store", "prefill": "pattern", "decode": "select"}
SOURCE = {"from": "somebody", "method": "roles"}


@cache
def model():
    return tiny_model(kv_heads=2, group=2, layers=3)


def outcome(data: dict) -> object:
    """What patching with ``data`` comes to: the plan of every layer, or the refusal."""
    try:
        patch_model(model(), copy.deepcopy(data))
        return state_of(model()).plans
    except ConfigError as error:
        return str(error)
    finally:
        unpatch_model(model())


def bases() -> list[dict]:
    """Configs that patch, in which every key means something at least once."""
    described = {"ids": ["org/x"], **LongCtxConfig.describe(model().config)}
    pattern = {"pattern": "vertical_slash"}
    table = {"budgets": [pattern, {"pattern": "dense"}], "map": [[0, 1, 0, 1]] * 3, "source": SOURCE}
    use = {"min_tokens": 9, "retrieval": {"table": "m"}, "tables": {"m": table}}
    budget = {"kv_budget": 0.6, "kv_budget_tokens": 4000, "dense_layers": [0], "source": SOURCE, "measured": {"a": 1}}
    other = {"alternatives": {"b": {"roles": ["RR", "SR", "SS"], "source": SOURCE}}, "use": "b"}
    third = {"b": {"scores": [row[::-1] for row in SCORES]}}
    equal = {"scores": [[0.5, 0.4], [0.4, 0.1], [0.2, 0.1]], "retrieval_fraction": 0.5, "confidence": "low"}
    whole = {"stores": {"retrieval": {"store": "full"}, "streaming": {"store": "sink_recent"}}}
    whole |= {"prefill": {**use, "streaming": {"pattern": "sink_recent"}, "share_groups": True}, "kernel": "cpu"}
    whole |= {"decode": {"retrieval": {"select": "dense"}}}
    heads = [
        {"scores": SCORES, **budget},
        {"scores": SCORES, "balance": 2, "retrieval_fraction": 0.34, "confidence": "measured"},
        {"scores": SCORES, "granularity": "layer", "retrieval_fraction": 0.34, "confidence": "measured"},
        {"roles": ["RS", "SS", "SR"], "dense_layers": [1], "source": SOURCE},
        {"roles": ["RS", "SS", "SR"], **other},
        {"scores": SCORES, "use": "b", "alternatives": third},
        equal,
    ]
    found = [{"model": described, "heads": one, **copy.deepcopy(whole)} for one in heads]
    for folder, key in FOLDERS.items():
        for word in words(folder):
            for role in load(folder, word).roles:
                found.append(copy.deepcopy(found[1]))
                found[-1][folder][role] = {key: word}
    compensated = copy.deepcopy(found[1])
    growing = {"min": 40, "fraction": 0.3}
    compensated["stores"]["streaming"] = {"store": "sink_recent_compensated", "recent": growing}
    return [*found, compensated, *({**copy.deepcopy(found[1]), "stores": {"retrieval": one}} for one in evictions())]


def evictions() -> list[dict]:
    """Stores that evict: by every score, with everything that may come after, each kind of budget and of store."""
    evicted = {"store": "evicted", "budget": {"tokens": 90}, "recent": 9}
    found = []
    for word in words("eviction"):
        by = "uniform" if load("eviction", word).alike else "head"
        found.append({**evicted, "rule": {"score": word}, "by": by})
    found += [{**evicted, "rule": {"score": "key_norm"}, "after": {"after": word}} for word in words("eviction.after")]
    even = {**evicted, "rule": {"score": "key_norm"}, "by": "layer", "budget": {"share": 0.3}, "every": 64}
    return [*found, {**even, "keep": {"store": "quantized"}}, {**evicted, "by": "model", "floor": 0.1}]


@dataclass
class Leaf:
    """A value of a config that is no mapping of ours, or a word; ``path`` leads to it in the plain data."""

    path: tuple
    value: typing.Any
    hint: typing.Any
    metadata: typing.Mapping

    @property
    def name(self) -> str:
        return ".".join(str(key) for key in self.path if not isinstance(key, int))

    def others(self) -> typing.Iterator[object]:
        """Other values that have the type and the bounds of the field."""
        for other in _others(self.value, self.metadata):
            try:
                if other != self.value and registry.convert(other, self.hint, "", self.metadata) != self.value:
                    yield other
            except ConfigError:
                continue


def leaves(spec: typing.Any, path: tuple = ()) -> typing.Iterator[Leaf]:
    hints = typing.get_type_hints(type(spec))
    for one in dataclasses.fields(spec):
        yield from below(getattr(spec, one.name), (*path, one.name), hints[one.name], one.metadata)


def below(value, path, hint, metadata) -> typing.Iterator[Leaf]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    inner = [(key, item) for key, item in items if dataclasses.is_dataclass(item)]
    if dataclasses.is_dataclass(value):
        if metadata.get("folder") and type(value) is not metadata["instead"]:
            folder, role = metadata["folder"], metadata["role"]
            fit = [word for word in words(folder) if role in load(folder, word).roles]
            yield Leaf((*path, metadata["key"]), registry.spec_word(value), str, {"choices": fit})
        yield from leaves(value, path)
    elif inner:
        for key, item in inner:
            yield from below(item, (*path, key), hint, metadata)
    else:
        yield Leaf(path, value, hint, metadata)


def _others(value, metadata) -> typing.Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from metadata.get("choices", ())
        tried = (value + 1, value - 1, value * 2, value // 2, value / 2, metadata.get("min"), metadata.get("max"))
        yield from (type(value)(one) for one in tried if one is not None)
    elif isinstance(value, tuple):
        rows = [list(item)[::-1] if isinstance(item, tuple) else item[::-1] for item in value if not _is_number(item)]
        yield from (list(value)[::-1], rows, [0], [2], [*value, "other"])
    elif isinstance(value, dict):
        yield {**value, "b": "other"}
    else:
        yield from metadata.get("choices", ("cpu", "stock", "b", "qwen2", 0.2, 1, [2]))


def _is_number(value) -> bool:
    return isinstance(value, (int, float))


def changed(data: dict, path: tuple, value: object) -> dict:
    made = copy.deepcopy(data)
    spot = made
    for key in path[:-1]:
        spot = spot.setdefault(key, {}) if isinstance(spot, dict) else spot[key]
    spot[path[-1]] = value
    return made


def unread(configs: list[dict], free: set[str]) -> set[str]:
    """Names of the keys whose value may be any other without a change; ``free`` collects those that say so."""
    seen: dict[str, bool] = {}
    for data in configs:
        before, config = outcome(data), LongCtxConfig.from_dict(data)
        assert not isinstance(before, str), before
        plain = config.to_dict()
        assert outcome(plain) == before
        for leaf in leaves(config):
            outcomes = (outcome(changed(plain, leaf.path, other)) for other in leaf.others())
            if leaf.metadata.get("free"):
                free.add(leaf.name)
                assert all(after == before for after in outcomes), leaf.name
            elif not seen.get(leaf.name):
                moved = [after != before for after in itertools.islice(outcomes, 12)]
                if moved:  # a word that is the only one has no other
                    seen[leaf.name] = any(moved)
    return {key for key, moved in seen.items() if not moved}


def test_every_key_changes_the_plan_or_is_refused():
    free: set[str] = set()
    assert unread(bases(), free) == set()
    assert {key.rpartition(".")[2] for key in free} == {"ids", "max_position_embeddings", "source", "measured"}


def test_a_key_that_nothing_reads_is_caught(monkeypatch):
    @dataclass(frozen=True)
    class Section(config_sections.DecodeSection):
        unread: int = field(default=3, metadata={"min": 0, "max": 9, "unit": "tokens"})

    hints = typing.get_type_hints(LongCtxConfig) | {"decode": Section}
    real = typing.get_type_hints
    monkeypatch.setattr(typing, "get_type_hints", lambda cls: hints if cls is LongCtxConfig else real(cls))
    assert "decode.unread" in unread(bases()[:1], set())


def test_what_is_ignored_at_run_time_says_so():
    for cls in (ModelSection, config_sections.HeadsSection, config_sections.PrefillTable):
        for one in dataclasses.fields(cls):
            assert ("ignored at run time" in meanings(cls)[one.name]) == bool(one.metadata.get("free"))


@pytest.fixture
def new_word(monkeypatch):
    """Adds a word to a folder, as a new file would."""

    def add(folder: str, base: type, role: str, **own) -> None:
        module = types.ModuleType(f"hf_longctx.{folder}.newest")
        made = type("Newest", (base,), {"roles": (role,), "__module__": module.__name__, **own})
        module.Newest = dataclass(frozen=True)(made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        there = registry.words
        monkeypatch.setattr(registry, "words", lambda at: (*there(at), "newest") if at == folder else there(at))

    return add


@pytest.mark.parametrize(
    ("folder", "key", "base", "role", "works"),
    [
        ("decode", "select", SelectSpec, "retrieval", "dense"),
        ("prefill", "pattern", PatternSpec, "streaming", "sink_recent"),
    ],
)
def test_a_new_word_that_nothing_runs_is_refused(new_word, folder, key, base, role, works):
    new_word(folder, base, role)
    data = {**bases()[1], folder: {role: {key: "newest"}}}
    for call in (lambda: LongCtxConfig.from_dict(data), lambda: patch_model(model(), data)):
        refused(call, f"{folder}.{role}: got {key} 'newest'", f"What works: {key} '{works}'.")
    data[folder][role][key] = works
    assert not isinstance(outcome(data), str)


def test_a_new_selection_is_run(new_word):
    new_word("decode", Select, "retrieval")
    data = {**bases()[1], "decode": {"retrieval": {"select": "newest"}}}
    assert "Newest" in str(outcome(data))


def test_a_new_pattern_of_retrieval_heads_is_run(new_word):
    new_word("prefill", PatternSpec, "retrieval")
    data = {**bases()[1], "prefill": {"retrieval": {"pattern": "newest"}}}
    assert "Newest" in str(outcome(data))
