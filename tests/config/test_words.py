"""Words come from the folder's listing only, and every field of a spec is checked."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest
from helpers.config_cases import refused

from hf_longctx.config import words as registry
from hf_longctx.config.words import build, dump, load, make, words
from hf_longctx.errors import ConfigError

pytestmark = pytest.mark.quick

FOLDERS = ("stores", "prefill", "decode", "eviction", "eviction.after")

PROBE = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class TopKeys:
    roles = ("retrieval",)
    keys: int = field(metadata={"min": 1, "max": 100, "unit": "blocks"})
    share: float = field(default=0.5, metadata={"above": 0.0, "max": 1.0})
    mode: str = field(default="mean", metadata={"choices": ("mean", "max")})
    exact: bool = False
    cap: int | None = None
"""


@dataclass(frozen=True)
class Inner:
    low: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class Section:
    window: int | Inner = 8
    old_style: Optional[int] = None  # noqa: UP045
    grid: tuple[tuple[float, ...], ...] = ()
    free: dict = field(default_factory=dict)
    named: dict[str, Inner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.old_style == 13:
            raise ConfigError("old_style: got 13, expected another number.")


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A folder with the words of prefill/ and ``top_keys``, a file without a class, and files that are no words."""
    import hf_longctx.prefill as package

    for name, text in {"top_keys": PROBE, "empty": "", "_private": PROBE, "base": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"hf_longctx.prefill.{name}", raising=False)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield
    for name in ("top_keys", "empty"):
        sys.modules.pop(f"hf_longctx.prefill.{name}", None)
        vars(package).pop(name, None)


def test_every_file_of_every_folder_is_a_word_with_a_frozen_class():
    found = [(folder, word) for folder in FOLDERS for word in words(folder)]
    assert len(found) >= 5
    assert {("stores", "full"), ("stores", "sink_recent"), ("prefill", "dense"), ("decode", "dense")} <= set(found)
    assert {("eviction", "snapkv"), ("eviction.after", "drop")} <= set(found)
    assert ("eviction", "after") not in found, "a folder is no word"
    for folder, word in found:
        cls = load(folder, word)
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen and cls.__module__.endswith(f".{word}")
        assert set(cls.roles) <= {"retrieval", "streaming"} and cls.roles


def test_listing_leaves_out_base_and_underscore_names(probe):
    assert "top_keys" in words("prefill")
    assert not {"base", "_private", "__init__"} & set(words("prefill"))


def test_camel_case():
    assert load("stores", "sink_recent").__name__ == "SinkRecent"


@pytest.mark.parametrize(
    "word", ["../errors", "os", "base", "__init__", "full.py", "stores.full", "", "Full", 3, None, ["full"]]
)
def test_only_listed_words_are_imported(word, monkeypatch):
    known = ", ".join(words("stores"))
    monkeypatch.setattr(registry.importlib, "import_module", only_packages(registry.importlib.import_module))
    refused(lambda: load("stores", word, "stores.retrieval.store"), "stores.retrieval.store: got", known)


def only_packages(original):
    def import_module(name):
        assert name in {f"hf_longctx.{folder}" for folder in FOLDERS}, f"imported {name}"
        return original(name)

    return import_module


def test_import_guard_can_fail(monkeypatch):
    monkeypatch.setattr(registry.importlib, "import_module", only_packages(registry.importlib.import_module))
    with pytest.raises(AssertionError, match="imported hf_longctx.stores.full"):
        load("stores", "full")


def test_near_match():
    assert "Did you mean 'sink_recent'?" in refused(lambda: load("stores", "sink_recents"))
    assert "Did you mean" not in refused(lambda: load("stores", "zzz"))


def test_file_without_its_class_is_no_word(probe):
    refused(
        lambda: load("prefill", "empty", "prefill.retrieval.pattern"), "prefill.retrieval.pattern", "no dataclass Empty"
    )


def test_build_and_dump_round_trip(probe):
    given = {"pattern": "top_keys", "keys": 7, "share": 1, "cap": 3}
    spec = build("prefill", given, "pattern", "prefill.retrieval", "retrieval")
    assert (spec.keys, spec.share, spec.cap, spec.exact) == (7, 1.0, 3, False)
    assert type(spec.share) is float
    plain = dump(spec, "pattern")
    assert list(plain)[0] == "pattern" and plain["pattern"] == "top_keys"
    assert build("prefill", plain, "pattern", "x") == spec
    assert build("prefill", {**plain, "keys": 8}, "pattern", "x") != spec
    assert given == {"pattern": "top_keys", "keys": 7, "share": 1, "cap": 3}


def test_none_that_is_not_the_default_survives_dump():
    @dataclass(frozen=True)
    class Limit:
        cap: Any = 3

    assert dump(Limit(None)) == {"cap": None}
    assert dump(Limit(4)) == {"cap": 4}


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({}, ["p.keys: missing", "required here: keys"]),
        ({"keys": 0}, ["p.keys: got 0", "a whole number, at least 1 and at most 100 (blocks)"]),
        ({"keys": 101}, ["p.keys: got 101", "at most 100"]),
        ({"keys": True}, ["p.keys: got True", "a whole number"]),
        ({"keys": 2.0}, ["p.keys: got 2.0", "a whole number"]),
        ({"keys": "2"}, ["p.keys: got '2'", "a whole number"]),
        ({"keys": None}, ["p.keys: got None"]),
        ({"keys": 1, "share": 0.0}, ["p.share: got 0.0", "above 0.0 and at most 1.0"]),
        ({"keys": 1, "share": math.nan}, ["p.share: got nan"]),
        ({"keys": 1, "share": math.inf}, ["p.share: got inf"]),
        ({"keys": 1, "share": 10**400}, ["p.share: got 1000"]),
        ({"keys": 1, "share": False}, ["p.share: got False", "a number"]),
        ({"keys": 1, "share": "1e-1"}, ["p.share: got '1e-1'", "write 1.0e+6"]),
        ({"keys": 1, "mode": "maxx"}, ["p.mode: got 'maxx'", "one of: mean, max", "Did you mean 'max'?"]),
        ({"keys": 1, "mode": 1}, ["p.mode: got 1", "text"]),
        ({"keys": 1, "exact": 1}, ["p.exact: got 1", "true or false"]),
        ({"keys": 1, "cap": "x"}, ["p.cap: got 'x'", "a whole number"]),
        (
            {"keys": 1, "kesy": 1},
            ["p.kesy: unknown key", "fields of pattern 'top_keys': cap, exact", "Did you mean 'keys'?"],
        ),
        ({"keys": 1, 5: 1}, ["p.5: got 5", "a key that is text"]),
    ],
)
def test_wrong_fields(probe, fields, fragments):
    refused(lambda: build("prefill", {"pattern": "top_keys", **fields}, "pattern", "p"), *fragments)


@pytest.mark.parametrize("fields", [{"keys": 1}, {"keys": 100, "share": 1, "mode": "max", "exact": True, "cap": None}])
def test_values_on_the_bounds_fit(probe, fields):
    build("prefill", {"pattern": "top_keys", **fields}, "pattern", "p")


def test_given_values_are_clipped_in_messages():
    message = refused(lambda: load("stores", "x" * 10_000, "w"))
    assert len(message) < 300


@pytest.mark.parametrize("mapping", [None, "sink_recent", ["store"], 3])
def test_a_spec_is_a_mapping(mapping):
    refused(lambda: build("stores", mapping, "store", "stores.streaming"), "stores.streaming: got", "a mapping")


def test_word_missing():
    refused(lambda: build("stores", {"sink": 3}, "store", "stores.streaming"), "stores.streaming: 'store' is missing")


def test_wrong_role():
    call = lambda role: build("stores", {"store": "sink_recent"}, "store", "stores.retrieval", role)  # noqa: E731
    refused(
        lambda: call("retrieval"),
        "stores.retrieval.store: 'sink_recent' serves streaming heads",
        "for retrieval heads: ",
        "full",
    )
    assert call("streaming").sink == 64


def test_sections_convert_nested_types():
    section = make(
        Section,
        {"window": {"low": 2}, "old_style": 4, "grid": [[1, 2.5], []], "named": {"a.b": {}}, "free": {"x": [1]}},
    )
    assert section == Section(Inner(2), 4, ((1.0, 2.5), ()), {"x": [1]}, {"a.b": Inner()})
    assert make(Section, {"window": 3}).window == 3
    assert make(Section, dump(section)) == section


@pytest.mark.parametrize(
    ("mapping", "fragments"),
    [
        ({"window": {"low": -1}}, ["s.window.low: got -1", "at least 0"]),
        ({"window": "x"}, ["s.window: got 'x'", "a whole number"]),
        ({"grid": [[0.0], [0.0, "x"]]}, ["s.grid[1][1]: got 'x'", "a number"]),
        ({"grid": ["ab"]}, ["s.grid[0]: got 'ab'", "a list"]),
        ({"grid": 1}, ["s.grid: got 1", "a list"]),
        ({"named": {"a": {"lov": 1}}}, ["s.named.a.lov: unknown key", "Did you mean 'low'?"]),
        ({"free": {"x": [math.nan]}}, ["s.free.x[0]: got nan"]),
        ({"free": {"x": {1: 2}}}, ["s.free.x.1: got 1", "text"]),
        ({"free": {"x": object()}}, ["s.free.x: got <object", "quotes"]),
        ({"free": 3}, ["s.free: got 3", "a mapping"]),
        ({"old_style": 13}, ["s.old_style: got 13, expected another number"]),
    ],
)
def test_sections_name_the_full_path(mapping, fragments):
    refused(lambda: make(Section, mapping, "s"), *fragments)


def test_free_mapping_that_holds_itself():
    loop: dict = {}
    loop["again"] = loop
    refused(lambda: make(Section, {"free": loop}, "s"), "s.free.again.again", "levels deep")


def test_free_mapping_is_a_copy():
    free = {"x": [1]}
    section = make(Section, {"free": free})
    free["x"].append(2)
    dump(section)["free"]["x"].append(3)
    assert section.free == {"x": [1]}


def test_messages_end_as_sentences(probe):
    message = refused(lambda: build("prefill", {"pattern": "top_keys", "keys": 0}, "pattern", "p"))
    assert re.fullmatch(r"p\.keys: got 0, expected .*\.", message)
