"""A measured head map given away: identify, the file of ``--share``, examples/build_configs.py, the same heads."""

from __future__ import annotations

import copy
import json
from datetime import datetime, timedelta, timezone

import pytest
import yaml
from helpers.config_cases import refused
from helpers.every_family import CASES, ONE_EACH, tiny_config
from helpers.published import DATA, ENTRIES, hf_config
from helpers.scripts import script
from helpers.tiny import FAMILIES, config_for, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import LongCtxConfig, contribution, identify, patch_model
from hf_longctx.assets import asset
from hf_longctx.commands._app import app
from hf_longctx.config.words import load
from hf_longctx.identification.contribution import about, described, excerpt_of, read
from hf_longctx.identification.heads import methods

ID = "Me/Tiny-One"
STREAMING = {"sink": 4, "recent": 64}
ECHO = {"method": "echo_induction", "tokens": 40}


def quick(cases) -> list:
    """The cases, those of a record that an earlier one has for the slow suite."""
    return [pytest.param(one, marks=[] if one.model_type in ONE_EACH else [pytest.mark.slow]) for one in cases]


@pytest.fixture(scope="module")
def llama():
    """tiny-llama as if it came from the Hub."""
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()
    model.config._name_or_path = ID
    model.config._commit_hash = "ab" * 20
    return model, AutoTokenizer.from_pretrained(asset("tiny-llama"))


@pytest.fixture(scope="module")
def given(llama):
    """A contribution of every part."""
    config = identify(*llama, **ECHO, **STREAMING, target_drop=0.5, measure_tokens=256)
    return contribution(llama[0], config, licence="MIT")


@pytest.fixture
def folder(tmp_path):
    """A data folder whose table has no entry, and a folder for the configs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "checkpoints.yaml").write_text("[]")
    return tmp_path


def rebuilt(folder, **files: dict) -> list[str]:
    """Names of the configs that the script makes of these contributions."""
    for name, data in files.items():
        (folder / "data" / f"{name}.json").write_text(json.dumps(data))
    script("build_configs").main(["--data", str(folder / "data"), "--out", str(folder / "out")])
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.mark.parametrize("method", methods())
def test_a_shared_map_gives_the_same_roles(method, llama, folder):
    options = load("identification.methods", method).cases[-1]
    config = identify(*llama, method, **STREAMING, **options, retrieval_fraction=0.3125)
    data = contribution(llama[0], config, licence="CC-BY-4.0")
    assert data["kind"] == ("duo_gate" if method == "duo_gates" else "retrieval_score") and data["method"] == method
    assert rebuilt(folder, anything=data) == ["tiny-one.yaml"]
    made = LongCtxConfig.from_yaml(folder / "out" / "tiny-one.yaml")
    assert made.roles() == config.roles() and made.heads.retrieval_fraction == 0.3125
    assert made.model.ids == (ID,) and made.stores.streaming == config.stores.streaming
    assert made.model.fingerprint == config.model.fingerprint and made.heads.confidence == config.heads.confidence
    source = {key: made.heads.source[key] for key in ("what", "licence", "model", "revision", "file")}
    assert source == {
        "what": method,
        "licence": "CC-BY-4.0",
        "model": ID,
        "revision": "ab" * 20,
        "file": "anything.json",
    }
    patch_model(copy.deepcopy(llama[0]), made)


def test_a_reviewer_reads_everything_in_the_file(given, llama, folder):
    assert given["model"] == ID and given["revision"] == "ab" * 20 and given["licence"] == "MIT"
    shape = {key: given[key] for key in ("granularity", "num_layers", "num_heads", "num_kv_heads")}
    assert shape == {"granularity": "kv_head", "num_layers": 4, "num_heads": 4, "num_kv_heads": 4}
    assert given["settings"]["options"]["tokens"] == 40 and given["settings"]["seed"] == 0
    assert given["settings"]["target_drop"] == 0.5 and given["settings"]["curve_tokens"] == 256
    assert [row["retrieval_heads"] for row in given["curve"]][0] == 16 and len(given["curve"]) >= 2
    assert set(given["versions"]) == {"hf_longctx", "torch", "transformers", "python"}
    assert given["device"].startswith("cpu: ") and given["dtype"] == "float32"
    now = datetime.now(timezone.utc)
    assert given["date"] in {(now - timedelta(minutes=minutes)).date().isoformat() for minutes in (0, 30)}
    assert given["streaming"] == {"store": "sink_recent", "sink": 4, "recent": 64}
    assert described(given["config"]) == LongCtxConfig.describe(llama[0].config)
    assert rebuilt(folder, a=given) == ["tiny-one.yaml"]
    made = LongCtxConfig.from_yaml(folder / "out" / "tiny-one.yaml")
    assert made.heads.measured == {**given["settings"], "curve": given["curve"]}
    assert read(folder / "data" / "a.json") == given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [{}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}])
def test_the_part_of_config_json_describes_every_family(family, extra):
    model = tiny_model(family, **extra)
    found = about(model, "MIT", ID)
    assert described(found["config"]) == LongCtxConfig.describe(model.config) and "revision" in found
    assert about(patch_model(model, config_for(model)), "MIT", ID) == found, "patched or not"


@pytest.mark.parametrize("case", quick(CASES), ids=str)
def test_the_part_of_config_json_describes_every_type(case):
    hf_config = tiny_config(case)
    excerpt = json.loads(json.dumps(excerpt_of(hf_config)))
    assert described(excerpt) == LongCtxConfig.describe(hf_config)


def test_a_model_with_windows_of_its_own(folder):
    model = tiny_model("qwen3", sliding=32, layers=4)
    config = identify(model, None, **ECHO, **STREAMING, retrieval_fraction=0.5)
    data = contribution(model, config, licence="MIT", model_id=ID)
    rebuilt(folder, a=data)
    made = LongCtxConfig.from_yaml(folder / "out" / "tiny-one.yaml")
    assert made.roles() == config.roles() and made.model.full_attention_layers == (0, 2)


def test_what_cannot_be_given_away_is_refused(llama, given):
    model, tokenizer = llama
    config = identify(model, tokenizer, **ECHO, **STREAMING)
    for licence in ("", None, "see\nhere", "x" * 81):
        refused(lambda licence=licence: contribution(model, config, licence=licence), "licence: got", "CC-BY-4.0")
    for name in ("tiny", "a/b@c", "hf-longctx/tiny-llama", "/x/y", 3):
        refused(lambda name=name: contribution(model, config, licence="MIT", model_id=name), "model_id: got")
    local = tiny_model()
    refused(
        lambda: about(local, "MIT"), "the model was loaded from '', a folder; say its hub id (model_id, or --model-id)"
    )
    refused(lambda: contribution(local, config, licence="MIT", model_id=ID), "made for another model")
    by_hand = config_for(model)
    refused(lambda: contribution(model, by_hand, licence="MIT"), "a config that identify did not make")
    assert contribution(model, config, licence="MIT", model_id="you/Other")["model"] == "you/Other"


CHANGES = [
    ({"contribution": 2}, "a.json: contribution.contribution: got 2, expected"),
    ({"model": "../../etc/passwd"}, "model: got '../../etc/passwd'"),
    ({"model": "you/x@main"}, "model: got 'you/x@main'"),
    ({"kind": "prefill_pattern"}, "kind: got 'prefill_pattern'"),
    ({"method": "a: b"}, "method: got 'a: b'"),
    ({"licence": ""}, "licence: got ''"),
    ({"date": "yesterday"}, "date: got 'yesterday'"),
    ({"revision": "main"}, "revision: got 'main'"),
    ({"granularity": "query_head"}, "granularity: got 'query_head'"),
    ({"num_layers": 5}, "num_layers: got 5, expected 4, as config says"),
    ({"num_heads": 8}, "num_heads: got 8, expected 4, one value per KV head"),
    ({"num_kv_heads": 2}, "num_kv_heads: got 2, expected 4"),
    ({"values": [[1.0] * 4] * 3}, "values: got 3 rows, expected 4"),
    ({"values": [[1.0] * 4] * 3 + [[1.0]]}, "values[3]: got 1 entries, expected 4 KV heads"),
    ({"values": [[float("nan")] * 4] * 4}, "values[0][0]: got nan"),
    ({"values": [[0.0] * 4] * 4, "retrieval_fraction": 0.5}, "cut among 16 equal scores"),
    ({"retrieval_fraction": 2}, "retrieval_fraction: got 2"),
    ({"streaming": {"store": "offloaded_disk"}}, "streaming"),
    ({"streaming": {"store": "sink_recent", "sink": 4}}, "the store with all of its fields"),
    ({"confidence": "none"}, "confidence: got 'none'"),
    ({"config": {"model_type": "llama", "auto_map": {}}}, "config: got 'auto_map', expected one of: model_type"),
    ({"config": {"model_type": "no_such_type"}}, "config: Transformers makes no config of it"),
    ({"config": {"model_type": "llama", "hidden_size": "x"}}, "config: Transformers makes no config of it"),
    ({"config": {"model_type": "llama", "hidden_size": -3}}, "config: Transformers makes no config of it"),
    ({"config": {"model_type": "qwen3", "num_hidden_layers": 10**12}}, "config.num_hidden_layers: got 1000000000000"),
    ({"config": {}}, "config: Transformers makes no config of it"),
    ({"note": "x"}, "note: unknown key"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(CHANGES)])
def test_a_wrong_file_is_refused(change, said, given, folder):
    refused(lambda: rebuilt(folder, a={**given, **change}), "a.json", said)
    assert list((folder / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "got no model and kind"),
        ('{"model": "a/b"}', "got no model and kind"),
        ('{"contribution": 1, "model": "a/b", "kind": "duo_gate", "kind": "duo_gate"}', "a key is given twice"),
        ('{"contribution": 1, "model": "a/b", "kind": "duo_gate"}', "missing; required here"),
        ('{"contribution": 1, "model": "a/b", "kind": "duo_gate", "x": "' + "x" * 10**6 + '"}', "larger than 1 MB"),
    ],
)
def test_a_text_that_is_no_contribution_is_refused(text, said, folder):
    (folder / "data" / "a.json").write_text(text)
    refused(lambda: rebuilt(folder), "a.json: ", said)


def test_several_maps_of_one_model(given, folder):
    other = {**given, "method": "two_needle", "values": [row[::-1] for row in given["values"]]}
    gate = {**given, "method": "duo_gates", "kind": "duo_gate", "model": ID.lower(), "confidence": "low"}
    assert rebuilt(folder, a=given, b=other) == ["tiny-one.yaml"]
    made = LongCtxConfig.from_yaml(folder / "out" / "tiny-one.yaml")
    assert made.heads.source["file"] == "a.json"
    assert list(made.heads.alternatives) == ["hf_longctx-two_needle.retrieval_score"]
    (folder / "data" / "checkpoints.yaml").write_text(
        yaml.safe_dump([{"name": "one", "ids": [ID], "config": given["config"]}])
    )
    (folder / "out" / "tiny-one.yaml").unlink()
    assert rebuilt(folder, c=gate) == ["one.yaml"], "the table names it, and its ids are found in any case"
    made = LongCtxConfig.from_yaml(folder / "out" / "one.yaml")
    assert made.heads.source["file"] == "c.json" and made.heads.confidence == "low", "gates are taken first"
    refused(lambda: rebuilt(folder, d=other), "d.json: another file of Me/Tiny-One is called hf_longctx-two_needle")


def test_names_and_sizes_that_disagree_are_refused(given, folder):
    refused(lambda: rebuilt(folder, a=given, b={**given, "model": "You/tiny-ONE"}), "b.json: got You/tiny-ONE, but")
    (folder / "data" / "b.json").unlink()
    refused(
        lambda: rebuilt(folder, a={**given, "model": "me/tiny-llama"}), "another model's config is called tiny-llama"
    )
    wider = {**given["config"], "intermediate_size": 7}
    refused(lambda: rebuilt(folder, a=given, b={**given, "method": "two_needle", "config": wider}), "b.json: got ", "7")


def test_a_published_measurement_of_the_same_kind_comes_first(folder):
    name = "llama-3.1-8b-instruct"
    model = hf_config(name)
    entry = ENTRIES[name]
    kept = {"name": name, "ids": entry["ids"], "config": entry["config"]}
    (folder / "data" / "checkpoints.yaml").write_text(yaml.safe_dump([kept]))
    file = "retrieval_score.KVzip.Llama-3.1-8B-Instruct.json"
    published = json.loads((DATA / file).read_text("utf-8"))
    (folder / "data" / file).write_text(json.dumps(published))
    excerpt = {key: one for key, one in model.to_dict().items() if key in ("model_type", *entry["config"]) and one}
    excerpt["rope_parameters"] = model.to_dict()["rope_parameters"]
    mine = {"contribution": 1, "model": entry["ids"][0], "kind": "retrieval_score", "method": "two_needle"}
    mine |= {"source": "hf_longctx 1", "paper": "arXiv:1", "licence": "MIT", "granularity": "kv_head"}
    mine |= {"num_layers": 32, "num_heads": 8, "num_kv_heads": 8, "values": [[0.5 + i / 8 for i in range(8)]] * 32}
    mine |= {"retrieval_fraction": 0.25, "streaming": {"store": "sink_recent", "sink": 1, "recent": 2}}
    mine |= {
        "confidence": "measured",
        "settings": {},
        "curve": [],
        "versions": {},
        "device": "cpu",
        "dtype": "bfloat16",
    }
    mine |= {"date": "2026-01-31", "config": excerpt}
    rebuilt(folder, a=mine)
    made = LongCtxConfig.from_yaml(folder / "out" / f"{name}.yaml")
    assert made.heads.source["file"] == file and made.stores.streaming.recent == 256
    assert made.heads.alternatives["hf_longctx-two_needle.retrieval_score"].source["file"] == "a.json"


# The command.


def run(*args: object):
    return CliRunner().invoke(app, ["identify", *map(str, args)], env={"COLUMNS": "80"})


def test_the_command_writes_the_file(tmp_path, folder):
    share = folder / "data" / "mine.json"
    args = ["hf-longctx/tiny-llama", "--method", "echo_induction", "--set", "tokens=40", "--out", tmp_path / "my.yaml"]
    done = run(*args, "--share", share, "--licence", "MIT", "--model-id", ID)
    assert done.exit_code == 0 and f"{share} goes into examples/published_heads" in done.output, done.output
    assert rebuilt(folder) == ["tiny-one.yaml"]
    made = LongCtxConfig.from_yaml(folder / "out" / "tiny-one.yaml")
    assert made.roles() == LongCtxConfig.from_yaml(tmp_path / "my.yaml").roles()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--share", "FILE"], "--share: say under which licence you give the numbers away"),
        (["--share", "FILE", "--licence", "?"], "licence: got '?'"),
        (["--share", "FILE", "--licence", "MIT"], "loaded from 'tiny-llama', a folder; say its hub id (model_id,"),
        (["--share", "FILE.txt", "--licence", "MIT"], "--share: got"),
        (["--licence", "MIT"], "--licence: got 'MIT', but only --share FILE has a use for it"),
        (["--model-id", ID], "--model-id: got 'Me/Tiny-One', but only --share"),
    ],
)
def test_the_command_refuses_before_it_measures(more, said, tmp_path, monkeypatch):
    monkeypatch.setattr(load("identification.methods", "echo_induction"), "scores", None)
    more = [one.replace("FILE", str(tmp_path / "mine.json")) for one in more]
    done = run("hf-longctx/tiny-llama", "--method", "echo_induction", "--out", tmp_path / "my.yaml", *more)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_named_without_its_path(llama, tmp_path):
    (tmp_path / "words.txt").write_text("one two three four five six seven " * 2000)
    config = identify(*llama, "two_needle", length=128, text=tmp_path / "words.txt", **STREAMING)
    assert config.heads.measured["text"] == "words.txt"
    assert str(tmp_path) not in json.dumps(contribution(llama[0], config, licence="MIT"))
