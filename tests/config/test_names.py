"""A model or a config by every name people have for it, without the network wherever the name is known."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import huggingface_hub
import pytest
from helpers.config_cases import refused
from helpers.tiny import config_for, tiny_config, tiny_model
from typer.testing import CliRunner

from hf_longctx import LongCtxConfig, patch_model
from hf_longctx.commands._app import app
from hf_longctx.commands.configs import find_config
from hf_longctx.config.config import load_shipped
from hf_longctx.model.modules import state_of
from hf_longctx.planning import find as memory_find
from hf_longctx.planning.find import find
from hf_longctx.planning.memory import UNKNOWN_LENGTH, MemorySettings

EIGHT = "llama-3.1-8b-instruct"
NAMES = [EIGHT, "Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "META-LLAMA/meta-llama-3.1-8b"]
SETTINGS = MemorySettings(24 * 10**9)


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """No network and an empty hub cache; lists what somebody wanted to reach, or would have without HF_HUB_OFFLINE."""
    found: list = []
    read = memory_find.AutoConfig.from_pretrained

    def reads(path, local_files_only=False, **more):
        if not local_files_only and not Path(path).is_dir():
            found.append(path)
        return read(path, local_files_only=local_files_only, **more)

    monkeypatch.setattr(memory_find.AutoConfig, "from_pretrained", reads)

    def refuse(*args, **kwargs):
        found.append(args)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def invoke(*args: object, width: int = 80):
    done = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": str(width)})
    assert "Traceback" not in done.output
    return done


@pytest.mark.parametrize("name", NAMES)
def test_a_known_name_reaches_no_network(name, asked):
    wanted = load_shipped(EIGHT)
    assert find_config(name) == wanted
    memory_model = find(name, SETTINGS)
    assert memory_model.config == wanted and memory_model.made_for == 131072 and memory_model.name == name
    assert memory_model.weights == 2 * 8_030_261_248
    refused(lambda: patch_model(tiny_model(), name), "made for another model", "num_hidden_layers 32 (model: 3)")
    assert asked == []


@pytest.mark.parametrize(
    "args",
    [("configs", "show"), ("plan", "--context", "8k", "--memory", "24GB"), ("bench", "memory", "--memory", "24GB")],
    ids=lambda args: args[0],
)
def test_commands_take_a_hub_id(args, asked):
    done = invoke(*args, NAMES[-1])
    assert done.exit_code == 0 and NAMES[-1] in " ".join(done.output.split()), done.output
    assert max(map(len, done.output.splitlines())) <= 80 and asked == []


def test_patch_model_by_an_id(asked):
    from helpers.published import model_of

    model = patch_model(copy.deepcopy(model_of(EIGHT)), "Meta-Llama/LLAMA-3.1-8B")
    assert state_of(model).config == load_shipped(EIGHT) and asked == []


@pytest.mark.parametrize(
    "args",
    [("configs", "show"), ("plan", "--context", "8k", "--memory", "24GB"), ("bench", "memory", "--memory", "24GB")],
    ids=lambda args: args[0],
)
def test_a_folder_and_a_yaml_are_names(args, tmp_path, asked):
    tiny_config("llama").save_pretrained(tmp_path / "plain")
    own = config_for(tiny_model())
    config = tiny_config("llama")
    config.longctx = own.to_dict()
    config.save_pretrained(tmp_path / "own")
    own.to_yaml(tmp_path / "own.yaml")
    for name in (tmp_path / "own", tmp_path / "own.yaml"):
        done = invoke(*args, name, width=400)
        assert done.exit_code == 0, done.output
        assert "6 of 12 KV heads" in done.output
    done = invoke(*args, tmp_path / "plain", width=400)
    assert done.exit_code == 2 and "config='auto': no shipped config fits" in done.output
    (tmp_path / "empty").mkdir()
    assert invoke(*args, tmp_path / "empty").exit_code == 2
    assert asked == []


def test_configs_show_names_the_nearest_and_offline_reaches_no_network(asked):
    for name, near in (
        ("meta-llama/Llama-3.1-8B-Instrct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen3-8", "qwen3-8b"),
    ):
        done = invoke("configs", "show", name, width=2000)
        assert done.exit_code == 2 and f"Did you mean {near!r}?" in done.output, done.output
    assert asked == []


def test_a_control_an_unknown_id_is_asked_for(asked):
    refused(lambda: find("nobody/no-such-model", SETTINGS), "no shipped config and no id of one", "cannot be read")
    assert asked


def test_a_known_id_with_another_config(tmp_path, asked):
    load_shipped(EIGHT).override(heads={"retrieval_fraction": 0.25}).to_yaml(tmp_path / "quarter.yaml")
    memory_model = find("meta-llama/Llama-3.1-8B", SETTINGS, str(tmp_path / "quarter.yaml"))
    assert "".join(memory_model.config.roles()).count("R") == 64 and memory_model.made_for == 131072
    refused(lambda: find("meta-llama/Llama-3.1-8B", SETTINGS, "qwen3-8b"), "made for another model", "qwen3")
    refused(lambda: find(EIGHT.upper(), SETTINGS, "qwen3-8b"), "is a config itself")
    assert asked == []


def test_what_was_fetched_before_is_read(tmp_path, asked):
    name = "meta-llama/Llama-3.1-8B-Instruct"
    there = tmp_path / "hub" / "models--meta-llama--Llama-3.1-8B-Instruct"
    from helpers.published import hf_config

    hf_config(EIGHT, tie_word_embeddings=True, max_position_embeddings=777).save_pretrained(there / "snapshots" / "abc")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    memory_model = find(name, SETTINGS)
    assert (
        memory_model.made_for == 777
        and memory_model.notes == ()
        and memory_model.weights < find(EIGHT, SETTINGS).weights
    )
    assert asked == []


def test_the_length_a_model_was_made_for_and_how_well_its_heads_are_known(tmp_path):
    def said(name, *more):
        plan = invoke("plan", name, "--memory", "900GB", *more).output
        longest = invoke("bench", "memory", name, "--memory", "900GB").output
        assert max(map(len, (plan + longest).splitlines())) <= 80
        return " ".join(plan.split()), " ".join(longest.split())

    plan, longest = said(EIGHT, "--context", "128k")
    assert "was made for" not in plan and "The model was made for 131072 tokens." in longest
    assert "confidence" not in plan + longest
    assert "the model was made for 131072 tokens" in said(EIGHT, "--context", "256k")[0]
    low = "confidence of this head map is low: hf-longctx eval says what it costs"
    assert load_shipped("llama-2-7b-hf").heads.confidence == "low"
    assert all(low in text for text in said("llama-2-7b-hf", "--context", "4k"))
    plan, longest = said("qwen3-8b", "--context", "4k")
    assert "were not measured, and hf-longctx identify measures them" in plan
    assert "The confidence of this head map is none: nobody measured these heads" in longest
    data = load_shipped(EIGHT).to_dict()
    del data["model"]["max_position_embeddings"]
    data["heads"]["confidence"] = "none"
    LongCtxConfig.from_dict(data).to_yaml(tmp_path / "c.yaml")
    plan, longest = said(tmp_path / "c.yaml", "--context", "4k")
    assert UNKNOWN_LENGTH in plan and UNKNOWN_LENGTH[1:] in longest
    assert "confidence of this head map is none" in plan and "confidence of this head map is none" in longest


def test_every_shipped_config_says_what_it_was_made_for():
    from helpers.published import ENTRIES

    for name, entry in ENTRIES.items():
        wanted = entry.get("made_for", entry["config"]["max_position_embeddings"])
        assert load_shipped(name).model.max_position_embeddings == wanted > 2000
    for name in ("tiny-llama", "tiny-mistral", "tiny-qwen3"):
        assert load_shipped(name).model.max_position_embeddings == 8192
    assert find("hf-longctx/tiny-llama", SETTINGS).made_for == 8192


def test_a_scaled_rope_is_a_note(tmp_path):
    config = config_for(tiny_model())
    config.to_yaml(tmp_path / "c.yaml")
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    tiny_config("llama", rope_parameters=rope).save_pretrained(tmp_path / "scaled")
    memory_model = find(str(tmp_path / "scaled"), SETTINGS, str(tmp_path / "c.yaml"))
    assert "rope_type yarn: the heads were measured with rope_type default" in memory_model.notes[0]
