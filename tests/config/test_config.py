"""Configs: every key is checked, round trips are exact, roles and models are checked."""

from __future__ import annotations

import copy
import datetime
import json
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.config_cases import FINGERPRINT, SCORES, config, hf, plain, refused, whole

from hf_longctx.config.config import LongCtxConfig, kernel_words, load_shipped

pytestmark = pytest.mark.quick


def test_defaults_of_the_smallest_config():
    made = LongCtxConfig.from_dict(plain())
    assert made.roles() == ("RS", "SR", "SR")
    assert made.heads.retrieval_fraction == 0.5 and made.heads.kv_budget_tokens == 32768
    assert (made.stores.streaming.sink, made.stores.streaming.recent) == (64, 256)
    assert type(made.stores.retrieval).__name__ == "Full"
    assert made.prefill.min_tokens == 4096 and made.prefill.share_groups is False and made.prefill.table is None
    assert type(made.prefill.streaming).__name__ == "SinkRecent" and type(made.decode.retrieval).__name__ == "Dense"
    assert made.kernel == "auto"


@pytest.mark.parametrize("data", [plain(), whole(), plain(heads={"roles": ["RS", "SS", "SR"]})])
def test_round_trips(data, tmp_path):
    made = LongCtxConfig.from_dict(data)
    assert LongCtxConfig.from_dict(made.to_dict()) == made
    assert LongCtxConfig.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made
    made.to_yaml(tmp_path / "c.yaml")
    read = LongCtxConfig.from_yaml(tmp_path / "c.yaml")
    assert read == made and read.roles() == made.roles()
    assert pickle.loads(pickle.dumps(made)) == made and copy.deepcopy(made) == made
    assert made.override(stores={"streaming": {"sink": 1}}) != made


def test_a_config_does_not_share_what_it_was_made_from():
    data = whole()
    made = LongCtxConfig.from_dict(data)
    before = made.to_dict()
    data["heads"]["source"]["n"].append(3)
    made.to_dict()["heads"]["source"]["n"].append(4)
    assert made.to_dict() == before


def broken(path: str, value: object) -> dict:
    top = copy.deepcopy(whole())
    spot = top
    *parents, last = path.split("/")
    for parent in parents:
        spot = spot.setdefault(parent, {})
    spot[last] = value
    return top


@pytest.mark.parametrize(
    ("path", "value", "fragments"),
    [
        ("modle", {}, ["modle: unknown key", "heads, kernel, model", "Did you mean 'model'?"]),
        ("extends", "x", ["extends: works in config files only"]),
        ("model", None, ["model: got None", "a mapping"]),
        ("model/head_dim", 0, ["model.head_dim: got 0", "at least 1"]),
        ("model/num_hidden_layers", True, ["model.num_hidden_layers: got True", "a whole number"]),
        ("model/num_key_value_heads", 3, ["model.num_key_value_heads: got 3", "a divisor of 4"]),
        ("model/ids", "org/x", ["model.ids: got 'org/x'", "a list"]),
        ("model/ids", [3], ["model.ids[0]: got 3", "text"]),
        ("model/fingerprint/rope_teta", 1.0, ["model.fingerprint.rope_teta: unknown", "Did you mean 'rope_theta'?"]),
        ("model/fingerprint/rope_theta", "5e5", ["model.fingerprint.rope_theta: got '5e5'", "1.0e+6"]),
        ("heads/socres", [], ["heads.socres: unknown key", "Did you mean 'scores'?"]),
        ("heads/scores", None, ["heads.scores: got neither of scores and roles"]),
        ("heads/roles", ["RS", "RS", "RS"], ["heads.scores: got both of scores and roles"]),
        ("heads/scores", SCORES[:2], ["heads.scores: got 2 rows, expected 3, one per layer"]),
        ("heads/scores", [[1.0, 2.0, 3.0]] * 3, ["heads.scores[0]: got 3 entries, expected 2 KV heads"]),
        ("heads/scores", [[1.0, 0.5], [1.0, math.nan], [1, 1]], ["heads.scores[1][1]: got nan", "a number"]),
        ("heads/scores", [[1.0, 0.5], [math.inf, 0.0], [1, 1]], ["heads.scores[1][0]: got inf"]),
        ("heads/scores", [[1.0, False], [1, 1], [1, 1]], ["heads.scores[0][1]: got False"]),
        ("heads/retrieval_fraction", 0.5, ["heads.kv_budget: got 0.6", "not both"]),
        ("heads/retrieval_fraction", 1.01, ["heads.retrieval_fraction: got 1.01", "at least 0.0 and at most 1.0"]),
        ("heads/kv_budget", 0, ["heads.kv_budget: got 0", "above 0.0 and at most 1.0"]),
        ("heads/kv_budget", 0.0001, ["heads.kv_budget: got 0.0001", "8 tokens", "smallest: 0.000245"]),
        ("heads/kv_budget_tokens", 0, ["heads.kv_budget_tokens: got 0", "at least 1", "(tokens)"]),
        ("heads/dense_layers", [1, 1], ["heads.dense_layers: got (1, 1)", "every layer once"]),
        ("heads/dense_layers", [3], ["heads.dense_layers[0]: got 3", "a layer from 0 to 2"]),
        ("heads/dense_layers", [-1], ["heads.dense_layers[0]: got -1", "at least 0"]),
        ("heads/balance", 3, ["heads.balance: got 3", "a divisor of the 2 KV heads"]),
        ("heads/balance", 0, ["heads.balance: got 0", "at least 1"]),
        ("heads/granularity", "layers", ["heads.granularity: got 'layers'", "kv_head, layer", "Did you mean 'layer'?"]),
        ("heads/confidence", "high", ["heads.confidence: got 'high'", "one of: measured, low, none"]),
        ("heads/use", "kvzip.scores", ["heads.use: got 'kvzip.scores'", "Did you mean 'kvzip.score'?"]),
        ("heads/use", "kvzip.score", ["heads.kv_budget: got 0.6", "over roles"]),
        ("heads/alternatives/b", {}, ["heads.alternatives.b.scores: got neither"]),
        ("heads/alternatives/b", {"roles": ["RS"]}, ["heads.alternatives.b.roles: got 1 rows, expected 3"]),
        ("heads/alternatives/b", {"roles": ["RS", "RSS", "RS"]}, ["heads.alternatives.b.roles[1]: got 3 entries"]),
        (
            "heads/alternatives/b",
            {"roles": ["RS", "Rs", "RS"]},
            ["heads.alternatives.b.roles[1]: got 'Rs'", "letters R"],
        ),
        ("heads/alternatives/b", {"scores": SCORES, "use": "x"}, ["heads.alternatives.b.use: unknown key"]),
        ("heads/source", {"date": datetime.date(2025, 1, 1)}, ["heads.source.date: got", "in quotes"]),
        ("heads/measured", [1], ["heads.measured: got [1]", "a mapping"]),
        ("stores/streaming/snik", 4, ["stores.streaming.snik: unknown key", "recent, sink", "Did you mean 'sink'?"]),
        ("stores/streaming/sink", -1, ["stores.streaming.sink: got -1", "at least 0 (tokens)"]),
        ("stores/streaming/recent", 0, ["stores.streaming.recent: got 0", "at least 1 (tokens)"]),
        ("stores/streaming/store", "sink_recant", ["stores.streaming.store: got 'sink_recant'", "'sink_recent'?"]),
        ("stores/retrieval", {"store": "sink_recent"}, ["stores.retrieval.store: 'sink_recent' serves streaming"]),
        ("stores/streaming", {"store": "full"}, ["stores.streaming.store: 'full' serves retrieval"]),
        ("stores/streming", {}, ["stores.streming: unknown key", "Did you mean 'streaming'?"]),
        ("stores/streaming", {"sink": 4}, ["stores.streaming: 'store' is missing; known: evicted, full, "]),
        ("stores/retrieval", {"store": "../../errors"}, ["stores.retrieval.store: got '../../errors'"]),
        ("prefill/streaming", {"pattern": "dense"}, ["prefill.streaming.pattern: 'dense' serves retrieval"]),
        (
            "prefill/retrieval",
            {"pattern": "sink_recent"},
            ["prefill.retrieval.pattern: 'sink_recent' serves streaming"],
        ),
        ("prefill/retrieval", {"table": "n"}, ["prefill.retrieval.table: got 'n', expected one of: m"]),
        ("prefill/retrieval", {}, ["prefill.retrieval: 'pattern' is missing"]),
        ("prefill/min_tokens", -1, ["prefill.min_tokens: got -1", "(tokens)"]),
        ("prefill/share_groups", "yes", ["prefill.share_groups: got 'yes'", "true or false"]),
        ("prefill/tables/m/map", [[0] * 4] * 2, ["prefill.tables.m.map: got 2 rows, expected 3"]),
        ("prefill/tables/m/map", [[0] * 2] * 3, ["prefill.tables.m.map[0]: got 2 entries, expected 4 query heads"]),
        ("prefill/tables/m/map", [[0] * 4, [0, 1, 0, 0], [0] * 4], ["prefill.tables.m.map[1][1]: got 1", "1 budgets"]),
        ("prefill/tables/m/map", [[-1] * 4] * 3, ["prefill.tables.m.map[0][0]: got -1", "at least 0"]),
        (
            "prefill/tables/m/budgets",
            [{"pattern": "densa"}],
            ["prefill.tables.m.budgets[0].pattern: got 'densa'", "'dense'?"],
        ),
        ("prefill/tables/m/budgets", {}, ["prefill.tables.m.budgets: got {}", "a list"]),
        ("prefill/tables/m", {"budgets": []}, ["prefill.tables.m.map: missing"]),
        ("decode/retrieval", {"select": "top"}, ["decode.retrieval.select: got 'top'", "dense"]),
        ("kernel", "layout", ["kernel: got 'layout'", "auto, stock"]),
        ("kernel", "refrence", ["kernel: got 'refrence'", "Did you mean 'reference'?"]),
        ("kernel", None, ["kernel: got None", "text"]),
    ],
)
def test_wrong_entries(path, value, fragments):
    assert LongCtxConfig.from_dict(whole())
    refused(lambda: LongCtxConfig.from_dict(broken(path, value)), *fragments)


@pytest.mark.parametrize(
    "key", ["model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
)
def test_dimensions_are_required(key):
    data = plain()
    del data["model"][key]
    refused(lambda: LongCtxConfig.from_dict(data), f"model.{key}: missing")


@pytest.mark.parametrize("section", ["model", "heads"])
def test_sections_that_are_required(section):
    refused(lambda: LongCtxConfig.from_dict({k: v for k, v in plain().items() if k != section}), f"{section}: missing")


@pytest.mark.parametrize("data", [None, [], "auto", 3])
def test_a_config_is_a_mapping(data):
    refused(lambda: LongCtxConfig.from_dict(data), "config: got", "a mapping")


def test_replace_is_checked_as_well():
    made = config()
    refused(lambda: replace(made.heads, dense_layers=(0, 0)), "dense_layers: got (0, 0)")
    refused(lambda: replace(made, kernel="x"), "kernel: got 'x'")
    refused(lambda: replace(made, heads=replace(made.heads, balance=3)), "heads.balance: got 3")


def test_kernel_words_are_files():
    assert kernel_words()[:2] == ("auto", "stock") and "reference" in kernel_words()
    assert not {"layout", "dispatch", "base", "__init__"} & set(kernel_words())


def test_roles_follow_the_config():
    assert config(retrieval_fraction=1 / 6).roles() == ("RS", "SS", "SS")
    assert config(dense_layers=[2]).roles() == ("RS", "SS", "RR")
    assert config(granularity="layer", confidence="low", retrieval_fraction=0.33).roles() == ("RR", "SS", "SS")
    assert config(balance=2, confidence="low", retrieval_fraction=0.33).roles() == ("RR", "SS", "SS")


def test_roles_given_in_the_config():
    made = LongCtxConfig.from_dict(plain(heads={"roles": ["RS", "SS", "SR"], "dense_layers": [1]}))
    assert made.roles() == ("RS", "RR", "SR") and made.heads.retrieval_fraction is None


def test_budget_knows_the_streaming_store():
    made = config(kv_budget=0.5, kv_budget_tokens=1000)
    assert "".join(made.roles()).count("R") == 1
    assert "".join(made.override(stores={"streaming": {"sink": 0, "recent": 1}}).roles()).count("R") == 2


def test_budget_knows_what_the_retrieval_store_packs():
    counts = []
    for store in ({"store": "full"}, {"store": "quantized"}, {"store": "quantized", "bits": 4}):
        made = config(kv_budget=0.5).override(stores={"retrieval": store})
        dense, kept = made.kv_bytes(32768)
        counts.append("".join(made.roles()).count("R"))
        assert kept <= 0.5 * dense
    assert counts[0] < counts[1] < counts[2]


def test_alternative_stands_in():
    data = plain()
    data["heads"] |= {"alternatives": {"b": {"scores": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], "source": {"m": 1}}}}
    assert LongCtxConfig.from_dict(data).roles() == ("RS", "SR", "SR")
    made = LongCtxConfig.from_dict(data).override(heads={"use": "b"})
    assert made.roles() == ("SS", "SR", "RR") and made.heads.active.source == {"m": 1}


def test_cut_among_zeros_is_found_when_the_config_is_made():
    zeros = [[0.9, 0.0], [0.0, 0.0], [0.0, 0.0]]
    refused(lambda: LongCtxConfig.from_dict(plain(heads={"scores": zeros})), "usable retrieval_fraction: 0.166667")
    assert LongCtxConfig.from_dict(plain(heads={"scores": zeros, "retrieval_fraction": 0.166667}))


def test_describe_and_check_model_agree():
    described = LongCtxConfig.describe(hf())
    assert described["fingerprint"] == FINGERPRINT
    made = LongCtxConfig.from_dict(plain(model=described))
    made.check_model(hf())
    json.dumps(described)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model_type": "qwen2"}, "model_type 'llama' (model: 'qwen2')"),
        ({"num_hidden_layers": 4}, "num_hidden_layers 3 (model: 4)"),
        ({"num_attention_heads": 8}, "num_attention_heads 4 (model: 8)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 (model: 4)"),
        ({"num_key_value_heads": None}, "num_key_value_heads 2 (model: 4)"),
        ({"head_dim": 32}, "head_dim 16 (model: 32)"),
        ({"head_dim": None, "hidden_size": 128}, "head_dim 16 (model: 32)"),
        ({"hidden_size": 65}, "fingerprint.hidden_size 64 (model: 65)"),
        ({"intermediate_size": 1}, "fingerprint.intermediate_size 128 (model: 1)"),
        ({"vocab_size": 1001}, "fingerprint.vocab_size 1000 (model: 1001)"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
            "fingerprint.rope_theta 500000.0 (model: 1000000.0)",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}}, "fingerprint.rope_type 'llama3' (model: 'default')"),
        ({"rope_parameters": None}, "fingerprint.rope_theta 500000.0 (model: None)"),
    ],
)
def test_check_model_names_what_disagrees(change, fragment):
    made = LongCtxConfig.from_dict(plain())
    made.check_model(hf())
    refused(lambda: made.check_model(hf(**change)), "made for another model", fragment)


def test_fingerprint_keys_that_are_absent_are_not_checked():
    data = plain()
    data["model"]["fingerprint"] = {"vocab_size": 1000}
    made = LongCtxConfig.from_dict(data)
    made.check_model(hf(intermediate_size=1))
    refused(lambda: made.check_model(hf(vocab_size=1)), "fingerprint.vocab_size")


def test_old_attributes_of_transformers():
    old = hf(rope_theta=500000, rope_scaling={"type": "llama3", "factor": 8.0}, head_dim=None)
    del old.rope_parameters
    LongCtxConfig.from_dict(plain()).check_model(old)
    old.rope_scaling = {"rope_type": "yarn"}
    assert LongCtxConfig.describe(old)["fingerprint"]["rope_type"] == "yarn"
    old.rope_scaling = None
    assert LongCtxConfig.describe(old)["fingerprint"]["rope_type"] == "default"
    del old.num_key_value_heads, old.head_dim
    assert (LongCtxConfig.describe(old)["num_key_value_heads"], LongCtxConfig.describe(old)["head_dim"]) == (4, 16)


def test_describe_refuses_what_is_no_language_model():
    refused(lambda: LongCtxConfig.describe(SimpleNamespace(model_type="vit")), "model.num_hidden_layers: got None")


def test_heads_are_counted_over_all_layers():
    shipped = load_shipped("llama-3.1-8b-instruct")
    letters = "".join(shipped.roles())
    assert (shipped.kv_heads, shipped.retrieval_heads) == (len(letters), letters.count("R")) == (256, 128)
