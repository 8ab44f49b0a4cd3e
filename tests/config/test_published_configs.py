"""The shipped configs of published checkpoints: they fit their models, and say what the published data say.

Models are built from ``checkpoints.yaml`` and head orders are computed from the JSON files, never from the YAML under
test.
"""

from __future__ import annotations

import functools
import json
import logging

import numpy as np
import pytest
import torch
from helpers.config_cases import refused
from helpers.published import DATA, ENTRIES, LISTED, ROOT, hf_config, model_of
from helpers.scripts import script
from helpers.tiny import config_for, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_longctx import ConfigError, LongCtxConfig, patch_model, patched, report
from hf_longctx.assets import assets
from hf_longctx.config import find
from hf_longctx.config.files import shipped, shipped_text
from hf_longctx.config.head_map import NONE
from hf_longctx.model.family import find_family
from hf_longctx.model.modules import state_of
from hf_longctx.planning.find import find as find_memory
from hf_longctx.planning.memory import MemorySettings

FILES = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("*.json"))}
OWN = {file: data for file, data in FILES.items() if "contribution" in data}  # of hf-longctx identify --share
NAMES = sorted(ENTRIES)
ORDER = (
    "duo_gate.",
    "retrieval_score.KVzip",
    "retrieval_score.HeadKV",
    "retrieval_score.retrieval-head-profile",
    "attention_span.MoA",
)
# The table of Phi-3-mini has the pattern stream_llm, and the layers of StableLM keep keywords from their attention.
NO_CONFIG = ["microsoft/Phi-3-mini-128k-instruct", "stabilityai/stablelm-2-1_6b"]
SAME_NUMBERS = ["qwen2-7b-instruct", "qwen2.5-7b-instruct"]  # only their names tell them apart

# Retrieval heads by hand from the data: half of the KV heads (a quarter without groups), or all that scored at all.
COUNTS = {
    "llama-3-8b-instruct-262k": 227,
    "llama-3.1-8b-instruct": 128,
    "llama-2-7b-32k-instruct": 256,
    "llama-2-7b-hf": 125,
    "llama-3.2-3b-instruct": 66,
    "qwen2.5-3b-instruct": 36,
    "qwen2.5-14b-instruct-1m": 192,
    "falcon3-7b-base": 56,
    "llama-3.1-70b-instruct": 640,
    "qwen2.5-72b-instruct": 640,
    "mixtral-8x7b-instruct-v0.1": 128,
    "qwen3-0.6b": 224,
}


read_models = functools.cache(find._models)
load_shipped = functools.cache(find.load_shipped)


@pytest.fixture(autouse=True)
def shipped_models(monkeypatch):
    """Every shipped config is read once for all tests."""
    monkeypatch.setattr(find, "_models", read_models)
    monkeypatch.setattr(find, "load_shipped", load_shipped)


def files_of(name: str) -> dict[str, dict]:
    return {file: data for file, data in FILES.items() if data["model"] in ENTRIES[name]["ids"]}


def kv_scores(data: dict, kv_heads: int) -> np.ndarray:
    """``[layers, KV heads]``: the largest number of each group."""
    values = np.array(data["values"], float)
    if data["kind"] == "attention_span":  # alpha tokens, and beta of each token of the text
        values = values[..., 0] / 131072 + values[..., 1]
    return values.reshape(len(values), kv_heads, -1).max(-1)


def constant(data: dict) -> np.ndarray:
    """``[layers, KV heads]``: whether no span of the group grows with the text."""
    return np.array(data["values"])[..., 1].reshape(len(data["values"]), data["num_kv_heads"], -1).max(-1) == 0


def expected_file(name: str) -> str | None:
    """The best kind of measurement there is, of the first id that has one."""
    ids = ENTRIES[name]["ids"]
    ranked = [
        (place, ids.index(data["model"]), file)
        for file, data in files_of(name).items()
        for place, start in enumerate(ORDER)
        if file.startswith(start) and (data["kind"] != "attention_span" or constant(data).mean() >= 0.1)
    ]
    # Our own come after what others published of the same kind, per KV head.
    kinds = {"duo_gate": 0.5, "retrieval_score": 1.5}
    ranked += [(kinds[data["kind"]], 0, file) for file, data in files_of(name).items() if file in OWN]
    return min(ranked)[2] if ranked else None


def holds(scores: np.ndarray, roles: np.ndarray) -> bool:
    """Whether no streaming head scored higher than a retrieval head, and both kinds are there."""
    return scores[roles == "R"].min() >= scores[roles == "S"].max() > -1


def letters(config: LongCtxConfig) -> np.ndarray:
    return np.array([list(row) for row in config.roles()])


def test_every_checkpoint_of_the_table_is_shipped():
    assert len(NAMES) >= 40
    assert sum(load_shipped(name).heads.confidence != "none" for name in NAMES) >= 20
    assert shipped() == tuple(sorted([*LISTED, *assets()]))
    assert set(COUNTS) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_patches_a_model_of_its_checkpoint(name):
    model, config, ids = model_of(name), load_shipped(name), ENTRIES[name]["ids"]
    assert type(model).__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ENTRIES[name]["config"]["model_type"]]
    find_family(config.model.model_type)
    assert list(config.model.ids) == ids and None not in vars(config.model.fingerprint).values()
    assert ids[0].rpartition("/")[2].lower() == name
    with patched(model, name):
        assert state_of(model).config == config
        own = {plan.layer_idx: plan.letters for plan in state_of(model).plans if plan.window is None}
        assert own == {layer: config.roles()[layer] for layer in config.layers}
    assert state_of(model) is None


@pytest.mark.parametrize("name", NAMES)
def test_auto_finds_the_config_by_every_id(name, monkeypatch):
    model = model_of(name)
    for one in ENTRIES[name]["ids"]:
        monkeypatch.setattr(model.config, "_name_or_path", one)
        with patched(model):
            assert state_of(model).config.model == load_shipped(name).model, one


def test_auto_finds_the_config_by_fingerprint_or_lists_the_candidates():
    described = {name: LongCtxConfig.describe(hf_config(name)) for name in NAMES}
    shared = []
    for name in NAMES:
        twins = [other for other in NAMES if described[other] == described[name]]
        config = hf_config(name, _name_or_path="me/finetune")
        if twins == [name]:
            assert find.resolve("auto", config).model == load_shipped(name).model
        else:
            shared.append(name)
            refused(lambda c=config: find.resolve("auto", c), f"{len(twins)} shipped configs fit", ", ".join(twins))
    assert shared == SAME_NUMBERS


@pytest.mark.slow
def test_by_its_name_a_checkpoint_is_counted_right_or_its_folder_is_asked_for():
    asked = []
    for name in NAMES:
        model = model_of(name)
        try:
            counted = find_memory(name, MemorySettings(24 * 10**9)).weights
        except ConfigError as error:
            assert f"{name} is a config, which does not say" in str(error) and "Name the model's folder" in str(error)
            asked.append(name)
            continue
        shared = model.get_input_embeddings().weight.numel() * model.config.tie_word_embeddings
        assert counted == 2 * (sum(map(torch.numel, model.parameters())) + shared), name
    plain = {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "glm", "granite"}
    assert asked == [name for name in NAMES if ENTRIES[name]["config"]["model_type"] not in plain]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_other_numbers_is_refused(name):
    config = load_shipped(name)
    facts = ENTRIES[name]["config"]
    for key, value in (("vocab_size", facts["vocab_size"] + 8), ("num_hidden_layers", facts["num_hidden_layers"] + 1)):
        refused(lambda k=key, v=value: config.check_model(hf_config(name, **{k: v})), "made for another model", key)
    refused(lambda: config.check_model(hf_config(name, rope_theta=123.0)), "rope_theta")
    other = next(
        one for one in NAMES if LongCtxConfig.describe(hf_config(one)) != LongCtxConfig.describe(hf_config(name))
    )
    refused(lambda: patch_model(model_of(other), name), "made for another model")
    assert state_of(model_of(other)) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_best_published_heads_are_the_retrieval_heads(name):
    config, file = load_shipped(name), expected_file(name)
    roles = letters(config)
    assert COUNTS.get(name) in (None, (roles == "R").sum())
    roles = roles[list(config.layers)]
    if file is None:
        assert (roles == "R").all() and config.heads.confidence == "none"
        assert config.heads.source["method"] == "heads not measured"
        return
    data = FILES[file]
    assert config.heads.source["file"] == file and config.heads.source["model"] == data["model"]
    assert config.heads.source.get("commit") == data.get("commit") and config.heads.source["from"] == data["source"]
    assert config.heads.confidence == data.get("confidence", "low" if file.startswith(ORDER[-2:]) else "measured")
    scores = kv_scores(data, data["num_kv_heads"])[list(config.layers)]
    if data["kind"] == "attention_span":
        assert ((roles == "S") == constant(data)).all()
        assert config.stores.streaming.recent == max(
            alpha for row in data["values"] for alpha, beta in row if beta == 0
        )
        return
    assert config.stores.streaming.recent == 256
    most = 0.25 if data["num_kv_heads"] == ENTRIES[name]["config"]["num_attention_heads"] else 0.5
    if file in OWN:
        most = data["retrieval_fraction"]
        assert [dict(row) for row in config.heads.measured["curve"]] == data["curve"] != []
    assert (roles == "R").sum() == min(round(most * scores.size), (scores > 0).sum())
    assert holds(scores, roles)
    assert roles.flat[scores.argmax()] == "R" and roles.flat[scores.size - 1 - scores[::-1, ::-1].argmin()] == "S"
    assert not holds(scores[::-1], roles) and not holds(np.roll(scores, 1, axis=1), roles), "a control: permuted heads"


def test_no_head_streams_where_heads_were_not_measured():
    unmeasured = [name for name in NAMES if load_shipped(name).heads.confidence == "none"]
    assert unmeasured == [name for name in NAMES if expected_file(name) is None]
    assert len(unmeasured) >= 5
    for name in unmeasured:
        assert set("".join(load_shipped(name).roles())) - {NONE} == {"R"}
    said = [name for name in NAMES if "Nothing was published about the heads" in shipped_text(name)]
    assert said == [name for name in NAMES if not files_of(name)]
    assert said == [name for name in NAMES if ENTRIES[name].get("measured") is False]


@pytest.mark.parametrize("name", NAMES)
def test_every_other_measurement_is_an_alternative(name):
    config = load_shipped(name)
    rest = {file for file in files_of(name) if not file.startswith("prefill_pattern")} - {expected_file(name)}
    assert {one.source["file"] for one in config.heads.alternatives.values()} == rest
    for label, alternative in config.heads.alternatives.items():
        data = FILES[alternative.source["file"]]
        source = alternative.source["file"].split(".")[1].lower()
        assert label.startswith(f"{source}.{data['kind']}")
        scores = kv_scores(data, config.model.num_key_value_heads)
        assert data["kind"] == "retrieval_set" or np.abs(np.array(alternative.scores) - scores.clip(0, 1)).max() < 1e-4
        scores = scores[list(config.layers)]
        middle = np.sort(scores, axis=None)[scores.size // 2 - 1]
        share = round((scores > middle).mean() or (scores >= middle).mean(), 6)  # no cut among equal scores
        roles = letters(config.override(heads={"use": label, "retrieval_fraction": share}))[list(config.layers)]
        assert (roles == "R").sum() == round(share * scores.size)
        assert holds(scores, roles)


def sets() -> list[tuple[str, str]]:
    return [(name, f) for name in NAMES for f in files_of(name) if f.startswith("retrieval_set")]


def test_a_published_set_serves_up_to_its_size():
    assert len(sets()) == sum(file.startswith("retrieval_set") for file in FILES)
    for name, file in sets():
        config, data = load_shipped(name), FILES[file]
        group = data["num_heads"] // data["num_kv_heads"]
        listed = {(layer, head // group) for one in data["ranked_heads"].values() for layer, head in one}
        scores = np.array(config.heads.alternatives["qrhead.retrieval_set"].scores)
        share = len(listed) / scores.size
        assert scores.max() == 1.0 and len(set(scores[scores > 0])) == len(listed), "no two heads share a place"
        half = {"use": "qrhead.retrieval_set", "retrieval_fraction": 0.5}
        refused(lambda c=config, h=half: c.override(heads=h), f"largest usable retrieval_fraction: {round(share, 6)}")
        if config.heads.confidence == "none":
            refused(lambda c=config: c.override(heads={"use": "qrhead.retrieval_set"}), str(round(share, 6)))
        roles = config.override(heads={"use": "qrhead.retrieval_set", "retrieval_fraction": share}).roles()
        assert {(i, j) for i, row in enumerate(roles) for j, role in enumerate(row) if role == "R"} == listed
        layer, head = next(iter(data["ranked_heads"].values()))[0]
        one = config.override(heads={"use": "qrhead.retrieval_set", "retrieval_fraction": 1 / scores.size})
        assert "".join(one.roles()).count("R") == 1 and one.roles()[layer][head // group] == "R"


def test_the_tables_are_the_published_budgets():
    seen, elsewhere = {}, {}
    for name in NAMES:
        config, first = load_shipped(name), ENTRIES[name]["ids"][0]
        for label, table in config.prefill.tables.items():
            assert config.prefill.table is None
            assert config.override(prefill={"retrieval": {"table": label}}).prefill.table == table
            data = FILES[table.source["file"]]
            assert data["model"] in ENTRIES[name]["ids"] and label.startswith("minference")
            got = [[(table.budgets[i].vertical, table.budgets[i].slash) for i in row] for row in table.map]
            want = [[tuple(cell[1:3]) for cell in row] for row in data["values"]]
            assert got == want, name
            pairs = [(budget.vertical, budget.slash) for budget in table.budgets]
            assert pairs == sorted({cell for row in want for cell in row})
            assert got != want[::-1] or len(pairs) == 1, "a control: layers upside down"
            seen[table.source["file"]] = table.source.get("note", "")
            elsewhere[table.source["file"]] = (
                f"searched on {data['model']}, not on {first}" if data["model"] != first else ""
            )
    wanted = {
        f for f, d in FILES.items() if f.startswith("prefill") and any(d["model"] in e["ids"] for e in ENTRIES.values())
    }
    assert set(seen) == wanted and sum(map(bool, elsewhere.values())) == 2
    for file, note in seen.items():
        counts = [tuple(cell[1:3]) for row in FILES[file]["values"] for cell in row]
        assert (f"{counts.count((1000, 6096))} of {len(counts)} heads have 1000/6096" in note) == (
            (1000, 6096) in counts
        )
        assert ("A-shape" in note) == ((100, 800) in counts)
        assert ("lower is better" in note) == FILES[file]["score_type"].startswith("error count")
        assert ("uniform: " in note) == (max(map(counts.count, set(counts))) >= 0.95 * len(counts))
        assert elsewhere[file] in note and ("searched on" in note) == bool(elsewhere[file])
    tables = load_shipped("llama-3.1-8b-instruct").prefill.tables
    assert [len(tables[name].budgets) for name in ("minference", "minference.v1")] == [1, 6]


def test_the_builder_makes_the_folder_byte_by_byte(tmp_path, caplog, monkeypatch):
    read = script("build_configs").read

    def of_this_transformers(folder):
        table, files = read(folder)
        return [entry for entry in table if entry["name"] in ENTRIES], files

    monkeypatch.setattr(script("build_configs"), "read", of_this_transformers)
    with caplog.at_level(logging.INFO, "build_configs"):
        script("build_configs").main(["--out", str(tmp_path)])
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {f"{name}.yaml": (ROOT / "configs" / f"{name}.yaml").read_bytes() for name in NAMES}
    known = {one for entry in ENTRIES.values() for one in entry["ids"]}
    unused = [file for file, data in FILES.items() if data["model"] not in known]
    assert [FILES[file]["model"] for file in unused] == NO_CONFIG
    said = [record for record in caplog.records if record.name == "build_configs"]
    assert [record.args[0] for record in said[:-1]] == unused
    assert f"no entry for {FILES[unused[0]]['model']}" in caplog.text


def test_the_builder_refuses_what_disagrees():
    build, entry = script("build_configs").build, ENTRIES["llama-3.1-8b-instruct"]
    files = [{**data, "file": file} for file, data in files_of("llama-3.1-8b-instruct").items()]
    assert build(entry, files) == build(entry, files[::-1])
    refused(lambda: build(entry, []), "llama-3.1-8b-instruct: no data file", "`measured: false`")
    said = {**entry, "measured": False}
    assert "heads not measured" in build(said, [])
    refused(lambda: build(said, files), "`measured: false`, but there is", files[0]["file"])
    other = {**entry, "config": {**entry["config"], "num_hidden_layers": 31}}
    refused(lambda: build(other, files), "duo_gate.duo-attention", "the table has (31, 8, 8)")
    refused(lambda: build(entry, [*files, files[0]]), "another file of meta-llama/Llama-3.1-8B-Instruct is called")
    phi = {**FILES["prefill_pattern.MInference.Phi-3-mini-128k-instruct.json"], "num_kv_heads": 8}
    phi |= {"model": entry["ids"][0], "file": "prefill_pattern.MInference.Llama-3.1-8B-Instruct.json"}
    refused(lambda: build(entry, [phi]), "got the patterns ['stream_llm']")


def test_notice_and_readme_name_every_source():
    notice, readme = ((folder / name).read_text("utf-8") for folder, name in ((ROOT, "NOTICE"), (DATA, "README.md")))
    published = {file: data for file, data in FILES.items() if file not in OWN}
    sources = {data["source"] for data in published.values()}
    assert len(sources) == 9
    for file, data in OWN.items():
        assert data["licence"] == "Apache-2.0" and data["source"].startswith("hf_longctx "), file
        assert f"| `{file}` | {data['model']} |" in readme, file
    for file, data in published.items():
        assert data["source"] in notice and data["commit"] in notice, file
        assert data["licence"] == ("Apache-2.0" if data["source"] == "mit-han-lab/omniserve" else "MIT"), file
        assert data["paper"].rpartition("arXiv:")[2].rstrip(")") in notice, file
        assert f"| `{file}` | {data['model']} |" in readme and data["commit"][:8] in readme, file
    rights = [line.strip() for line in notice.splitlines() if line.strip().startswith("Copyright (c)")]
    assert len(rights) == 7 and all(line in readme for line in rights)
    assert 'license-files = ["LICENSE", "NOTICE"]' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_kv_bytes_is_what_the_heads_keep():
    config = load_shipped("llama-3.1-8b-instruct")
    dense, kept = config.kv_bytes(32768)
    assert dense == 2 * 2 * 128 * 256 * 32768
    assert kept == 2 * 2 * 128 * (128 * 32768 + 128 * 320)
    assert config.kv_bytes(100, 4) == (4 * 2 * 128 * 256 * 100,) * 2
    model = tiny_model()
    patch_model(model, config_for(model, sink=4, recent=16))
    cache = model(torch.randint(3, 97, (1, 150))).past_key_values
    segments = [segment for layer in cache.layers for store in layer.stores for segment in read_segments(store)]
    held = sum(2 * k.shape[1] * length * k.shape[3] * k.element_size() for k, length in segments)
    assert state_of(model).config.kv_bytes(150, 4) == (cache.nbytes_dense, held)


def read_segments(store) -> list[tuple[torch.Tensor, int]]:
    """(keys, tokens) of what a decoded token reads; the history of a ring is for taking tokens back."""
    return [(segment.k, segment.length) for name, segment in store.segments.items() if name != "history"]


def test_a_config_that_saves_nothing_says_so(caplog):
    said = "were not measured, so all of them keep every token"
    for name, expected in (("qwen3-8b", True), ("llama-3.1-8b-instruct", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), patched(model_of(name), name):
            assert any(said in note for note in report(model_of(name)).notes) == expected
        assert (said in caplog.text) == expected
