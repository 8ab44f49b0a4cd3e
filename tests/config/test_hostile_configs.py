"""Configs that somebody made to break the reader: each is a ConfigError, at once, in a short message."""

from __future__ import annotations

import json

import pytest
from helpers.config_cases import SCORES, TABLE, plain, refused, whole, write
from helpers.tiny import tiny_model

from hf_longctx import ConfigError, LongCtxConfig, patch_model
from hf_longctx.bench.patterns import parse as parse_pattern
from hf_longctx.config import checks, strict_yaml
from hf_longctx.config import sections as config_sections
from hf_longctx.config import words as registry
from hf_longctx.config.checks import MOST_ITEMS
from hf_longctx.config.files import parse, read_file
from hf_longctx.config.head_map import assign
from hf_longctx.config.words import read_fields
from hf_longctx.evaluate.plan import listed

TAGGED = [
    *("!!int ''", "!!int x", "!!float ''", "!!float x", "!!bool x", "!!timestamp x", "!!map [1]", "!!set [1]"),
    *("!!omap 3", "!!omap [1]", "!!pairs [1]", "!!binary é", "!!null x", "!!str [1]", "!!seq 3", "!!python/name:os.x"),
    *("!own x", "2001-13-40", "!!binary aGk=", "!!set {a, b}", "2001-01-01"),
]
HUGE = [10**4400, -(10**4400), 2**20000, 10**400, float("inf"), float("nan")]


@pytest.mark.parametrize("value", TAGGED)
@pytest.mark.parametrize("key", ["a: {}", "heads: {{source: {{a: {}}}}}", "model: {{head_dim: {}}}"])
def test_tags_and_dates(tmp_path, key, value):
    path = write(tmp_path / "c.yaml", key.format(value) + "\n")
    message = refused(lambda: LongCtxConfig.from_yaml(path), str(path))
    assert len(message) < 1000


@pytest.mark.parametrize("value", TAGGED)
def test_values_on_a_command_line(value):
    for call in (
        lambda: read_fields([f"steps={value}"], "--set", "steps=5"),
        lambda: parse_pattern(f"p:a={value}", "p"),
    ):
        try:
            assert isinstance(call(), dict)  # a pattern's fields are checked afterwards, by their types
        except ConfigError as error:
            assert len(str(error)) < 600
    for text in ("&a [*a]", "[1, 2", "{a: 1, a: 2}", "0x" + "f" * 5000, "1:" * 9000 + "1"):
        refused(
            lambda text=text: read_fields([f"x={text}"], "--set", "steps=5"),
            "--set: got 'x=",
            "NAME=VALUE, e.g. steps=5",
        )
    for text in ("!!int ''", "*a", "", "a, null", "9" * 5000):
        refused(lambda text=text: listed(text, "--lengths", "512,2048"), "--lengths: got ")


def test_read_fields_reads_plain_data():
    assert read_fields(["min-length=5", "a=[1, x]", "b=", "c=1.5"], "--set", "a=1") == {
        "min_length": 5,
        "a": [1, "x"],
        "b": None,
        "c": 1.5,
    }
    refused(lambda: read_fields(["a"], "--set", "a=1"), "--set: got 'a', expected NAME=VALUE, e.g. a=1.")


@pytest.mark.parametrize("number", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize(
    "spot",
    ["model/num_hidden_layers", "model/fingerprint/rope_theta", "heads/source/x", "heads/measured/x", "heads/kv_budget"]
    + ["heads/balance", "stores/streaming/sink", "prefill/min_tokens", "model/ids", "kernel", "heads/use"],
)
def test_numbers_that_no_config_has(spot, number):
    data = whole()
    *parents, last = spot.split("/")
    place = data
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = number
    assert len(refused(lambda: LongCtxConfig.from_dict(data), spot.replace("/", "."))) < 400


@pytest.mark.parametrize(
    "text", ["0x" + "f" * 5000, "9" * 5000, "1:" * 100_000 + "1", "0b" + "1" * 20000, "1." * 9999], ids=range(5)
)
def test_long_numbers_in_yaml(tmp_path, text):
    path = write(tmp_path / "c.yaml", f"model: {{num_hidden_layers: {text}}}\n")
    assert len(refused(lambda: LongCtxConfig.from_yaml(path), str(path))) < 600


@pytest.mark.parametrize("form", [{"granularity": "layer"}, {"balance": 2}, {}])
@pytest.mark.parametrize("score", [1.7e308, -1.7e308, 1e31, 10**4400], ids=range(4))
def test_scores_whose_sum_overflows(form, score):
    data = plain(heads={"scores": [[score, score]] * 3, "confidence": "low", **form})
    refused(lambda: LongCtxConfig.from_dict(data), "heads.scores[0][0]: got ", "a number")
    refused(
        lambda: assign([[score, score]] * 3, fraction=0.5, **form), "heads.scores: got nan or inf, or a number beyond"
    )
    assert assign([[1e30, -1e30]] * 3, fraction=1.0, **form)


@pytest.mark.parametrize("path", ["a\0b.yaml", "\ud800.yaml", "x" * 5000 + ".yaml", "", "."], ids=range(5))
def test_paths_that_cannot_be(path):
    assert "\0" not in refused(lambda: LongCtxConfig.from_yaml(path), "cannot be read")
    refused(lambda: patch_model(tiny_model(), path or ".yaml"))


def test_counts_are_compared_before_any_entry_is_read(monkeypatch):
    million, looked_at = [[0] * 10**6], []
    real = registry._convert_scalar
    monkeypatch.setattr(registry, "_convert_scalar", lambda *given: looked_at.append(given) or real(*given))
    short, wide, tall = million, million * 3, [[0.5, 0.5]] * 10**6
    for heads in ({"scores": short}, {"scores": wide}, {"scores": tall}):
        refused(lambda heads=heads: LongCtxConfig.from_dict(plain(heads=heads)), "heads.scores")
        other = {"scores": SCORES, "alternatives": {"b": heads}}
        refused(lambda other=other: LongCtxConfig.from_dict(plain(heads=other)), "heads.alternatives.b.scores")
    for rows in (short, wide, [[0] * 4] * 10**6):
        prefill = {"tables": {"t": {**TABLE, "map": rows}}}
        refused(lambda prefill=prefill: LongCtxConfig.from_dict(plain(prefill=prefill)), "prefill.tables.t.map")
    assert looked_at == []


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model", {**plain()["model"], "ids": ["a"] * 10**6}),
        ("heads", {"scores": SCORES, "dense_layers": [0] * 10**6}),
        ("heads", {"scores": SCORES, "source": {"x": [1] * 10**6}}),
        ("heads", {"scores": SCORES, "measured": dict.fromkeys(map(str, range(10**5)), 1)}),
        ("heads", {"scores": SCORES, "alternatives": dict.fromkeys(map(str, range(10**5)))}),
        ("prefill", {"tables": {"t": {**TABLE, "budgets": TABLE["budgets"] * 10**5}}}),
        ("stores", dict.fromkeys(map(str, range(10**5)))),
    ],
)
def test_a_list_of_a_million_entries_is_refused_by_its_length(monkeypatch, section, value):
    calls = []
    for name in ("convert", "check_plain"):
        real = getattr(registry, name)
        monkeypatch.setattr(registry, name, lambda *given, real=real: calls.append(given) or real(*given))
    refused(lambda: LongCtxConfig.from_dict(plain(**{section: value})), "entries, expected at most", str(MOST_ITEMS))
    assert len(calls) < 100


def test_maps_that_cannot_be_counted_are_left_to_the_conversion():
    for model in ({}, {**plain()["model"], "num_hidden_layers": True}, {**plain()["model"], "num_key_value_heads": 0}):
        config_sections.check_counts(plain(model=model))
    for data in ({"model": 3}, {"model": plain()["model"], "heads": [], "prefill": {"tables": 3}}):
        config_sections.check_counts(data)
    config_sections.check_counts(plain(heads={"scores": {}, "alternatives": {"a": 3, "b": {"scores": [1, 2]}}}))


def test_texts_larger_than_any_config(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(strict_yaml.yaml, "load", lambda *given: read.append(given) or {})
    text = "a: [" + "1," * (strict_yaml.LARGEST_TEXT // 2) + "1]"
    path = write(tmp_path / "c.yaml", text)
    for call in (lambda: read_file(path), lambda: parse(text, str(path))):
        refused(call, f"{path}: larger than 1 MB", "24 kB")
    assert read == []
    assert parse("x" * strict_yaml.LARGEST_TEXT, "c") == {} and len(read) == 1
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        read_file("/dev/zero")


def test_long_words_are_neither_compared_nor_repeated(monkeypatch):
    asked = []
    monkeypatch.setattr(checks.difflib, "get_close_matches", lambda word, *rest: asked.append(word) or [])
    word = "x" * 5 * 10**6
    for data in (
        plain(kernel=word),
        plain(**{word: 1}),
        plain(heads={"scores": SCORES, word: 1}),
        plain(heads={"scores": SCORES, "use": word}),
        plain(heads={"scores": SCORES, "alternatives": {word: {}}}),
        plain(heads={"roles": [word] * 3}),
        plain(stores={"retrieval": {"store": word}}),
        plain(prefill={"retrieval": {"table": word}}),
    ):
        assert len(refused(lambda data=data: LongCtxConfig.from_dict(data))) < 400
    data = plain()
    data["model"]["model_type"] = data["model"]["fingerprint"]["rope_type"] = word
    assert len(refused(lambda: patch_model(tiny_model(), data))) < 700
    assert len(refused(lambda: patch_model(tiny_model(), word))) < 400
    assert all(len(one) <= checks.LONGEST for one in asked)


def test_a_config_of_every_shipped_kind_is_small_enough():
    from hf_longctx.config.files import shipped, shipped_text

    assert max(len(shipped_text(name)) for name in shipped()) < strict_yaml.LARGEST_TEXT / 20
    json.dumps(whole())
