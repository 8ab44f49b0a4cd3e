"""The ``longctx=`` flag of ``from_pretrained``: the drop-in class, install() and uninstall(), and what is saved."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.tiny import config_for, tiny_model
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import hf_longctx
from hf_longctx import AutoModelForCausalLM, ConfigError, LongCtxCache, LongCtxConfig, patch_model, unpatch_model
from hf_longctx.model import loading

IDS = torch.arange(3, 63)[None]
NEW = 8
OWNERS = (PreTrainedModel, AutoModel, transformers.AutoModelForCausalLM)


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def folder(model, tmp_path):
    """A checkpoint that knows nothing of this library."""
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def installed():
    hf_longctx.install()
    yield
    hf_longctx.uninstall()


def run(model) -> tuple[list[int], type]:
    """The tokens of a greedy generate(), and the type of its cache."""
    out = model.generate(IDS, max_new_tokens=NEW, return_dict_in_generate=True)
    return out.sequences[0, IDS.shape[1] :].tolist(), type(out.past_key_values)


def want(model, config) -> tuple[list[int], type]:
    """What a patched model gives; the dense tokens are different ones."""
    dense = run(model)
    got = run(patch_model(model, config))
    unpatch_model(model)
    assert dense[1] is DynamicCache
    assert got[1] is LongCtxCache
    assert got[0] != dense[0]
    return got


def saved(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, **keys) -> None:
    (folder / "config.json").write_text(json.dumps(saved(folder) | keys))


def stock(folder) -> list[int]:
    """Tokens of plain Transformers in a process that cannot import this library."""
    script = f"""
        import sys
        sys.modules["hf_longctx"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
        out = model.generate(torch.arange(3, 63)[None], max_new_tokens={NEW}, return_dict_in_generate=True)
        print(out.sequences[0, 60:].tolist(), type(out.past_key_values).__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, _, cache = done.stdout.strip().splitlines()[-1].rpartition(" ")
    assert cache == "DynamicCache"
    return json.loads(tokens)


@pytest.mark.parametrize("form", ["LongCtxConfig", "dict", "text path", "path"])
def test_the_flag_takes_what_patch_model_takes(model, folder, tmp_path, form):
    config = config_for(model)
    expected = want(model, config)
    path = tmp_path / "own.yaml"
    config.to_yaml(path)
    flag = {"LongCtxConfig": config, "dict": config.to_dict(), "text path": str(path), "path": path}[form]
    loaded = AutoModelForCausalLM.from_pretrained(folder, longctx=flag)
    assert run(loaded) == expected
    assert loaded.config.longctx == config.to_dict()


@pytest.mark.parametrize("flag", ["auto", True])
def test_auto_reads_what_the_checkpoint_says(model, folder, flag):
    rewrite(folder, longctx=config_for(model).to_dict())
    assert run(AutoModelForCausalLM.from_pretrained(folder, longctx=flag)) == want(model, config_for(model))


@pytest.mark.parametrize("flag", ["auto", True])
def test_auto_without_a_fitting_config_says_how_to_make_one(folder, flag):
    with pytest.raises(ConfigError, match="hf-longctx identify"):
        AutoModelForCausalLM.from_pretrained(folder, longctx=flag)


@pytest.mark.parametrize("flag", [None, False])
def test_without_the_flag_a_plain_checkpoint_stays_dense(model, folder, flag):
    loaded = AutoModelForCausalLM.from_pretrained(folder, longctx=flag)
    assert run(loaded) == run(model)
    assert not hasattr(loaded.base_model, "longctx_state")


def test_the_drop_in_class_is_transformers_own_otherwise(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    assert issubclass(AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    with pytest.raises(TypeError, match="longctx"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, longctx="auto")


def test_a_saved_model_is_patched_when_it_is_loaded_again(model, folder, tmp_path):
    config = config_for(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, longctx=config)
    expected, dense = run(loaded), run(model)
    loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again")["longctx"] == config.to_dict()
    assert run(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == expected

    off = AutoModelForCausalLM.from_pretrained(tmp_path / "again", longctx=False)
    assert run(off) == dense
    off.save_pretrained(tmp_path / "third")
    assert saved(tmp_path / "third")["longctx"] == config.to_dict(), "loading it dense once is no reason to forget it"

    other = config.override(stores={"streaming": {"recent": 5}})
    replaced = AutoModelForCausalLM.from_pretrained(tmp_path / "again", longctx=other)
    assert run(replaced)[0] != expected[0]
    assert replaced.config.longctx == other.to_dict()


def test_a_saved_patched_model_is_an_ordinary_checkpoint(model, tmp_path):
    dense = run(model)[0]
    before = set(model.config.to_dict())
    patch_model(model, config_for(model))
    model.save_pretrained(tmp_path)
    keys = saved(tmp_path)
    assert "longctx" not in before
    assert isinstance(keys["longctx"], dict)
    words = [value for key, value in keys.items() if "attn" in key and key != "longctx"]
    assert "longctx" not in words, f"the attention implementation must not be saved: {words}"
    assert stock(tmp_path) == dense
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert run(plain) == (dense, DynamicCache)
    assert run(patch_model(plain)) == run(model), "config='auto' finds the saved config"


def test_an_unpatched_model_saves_nothing_of_ours(model, tmp_path):
    unpatch_model(patch_model(model, config_for(model)))
    model.save_pretrained(tmp_path)
    assert "longctx" not in (tmp_path / "config.json").read_text()


def test_loading_info_dtype_and_device_map(model, folder):
    config = config_for(model)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, longctx=config, output_loading_info=True, dtype=torch.float64, device_map="cpu"
    )
    assert not info["missing_keys"]
    assert loaded.dtype == torch.float64
    assert run(loaded) == want(model.double(), config)
    dense, _ = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert run(dense)[1] is DynamicCache


def test_a_config_object_of_the_user_stays_as_it_was(model, folder):
    own = transformers.AutoConfig.from_pretrained(folder)
    before = own.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=own, longctx=config_for(model))
    assert run(loaded)[1] is LongCtxCache
    assert own.to_dict() == before
    assert own._attn_implementation != "longctx"


def test_attention_asked_for_comes_back_after_unpatching(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, longctx=config_for(model), attn_implementation="eager")
    assert loaded.config._attn_implementation == "longctx"
    assert unpatch_model(loaded).config._attn_implementation == "eager"


# What install() and uninstall() do to Transformers.


def test_install_gives_transformers_classes_the_flag(model, folder, tmp_path, installed):
    config = config_for(model)
    expected, dense = want(model, config), run(model)
    for cls in (LlamaForCausalLM, transformers.AutoModelForCausalLM, AutoModelForCausalLM):
        assert run(cls.from_pretrained(folder, longctx=config)) == expected
        assert run(cls.from_pretrained(folder)) == dense
    loaded, info = LlamaForCausalLM.from_pretrained(folder, longctx=config.to_dict(), output_loading_info=True)
    assert run(loaded) == expected
    assert "missing_keys" in info
    base = AutoModel.from_pretrained(folder, longctx=config)
    assert isinstance(base(IDS).past_key_values, LongCtxCache)

    loaded.save_pretrained(tmp_path / "again")
    for cls in (LlamaForCausalLM, transformers.AutoModelForCausalLM, AutoModelForCausalLM):
        for flag in (None, True, "auto", config):
            assert run(cls.from_pretrained(tmp_path / "again", longctx=flag)) == expected
        assert run(cls.from_pretrained(tmp_path / "again", longctx=False)) == dense


def test_every_load_patches_once(model, folder, monkeypatch, installed):
    calls = []
    patch = hf_longctx.model.loading.patch_model
    monkeypatch.setattr(hf_longctx.model.loading, "patch_model", lambda *args: calls.append(args) or patch(*args))
    for cls in (LlamaForCausalLM, transformers.AutoModelForCausalLM, AutoModelForCausalLM):
        calls.clear()
        cls.from_pretrained(folder, longctx=config_for(model))
        assert len(calls) == 1


def test_uninstall_puts_the_same_objects_back(folder):
    before = [owner.__dict__["from_pretrained"] for owner in OWNERS]
    hf_longctx.uninstall()
    hf_longctx.install()
    ours = [owner.__dict__["from_pretrained"] for owner in OWNERS]
    hf_longctx.install()
    assert [owner.__dict__["from_pretrained"] for owner in OWNERS] == ours, "a second install changes nothing"
    assert not set(map(id, ours)) & set(map(id, before))
    assert PreTrainedModel.from_pretrained.__doc__ == before[0].__func__.__doc__
    hf_longctx.uninstall()
    assert all(owner.__dict__["from_pretrained"] is old for owner, old in zip(OWNERS, before, strict=True))
    hf_longctx.uninstall()
    with pytest.raises(TypeError, match="longctx"):
        LlamaForCausalLM.from_pretrained(folder, longctx="auto")


@pytest.mark.parametrize("owner", OWNERS)
def test_uninstall_under_another_wrapper_is_an_error(owner, installed, folder):
    ours = [one.__dict__["from_pretrained"] for one in OWNERS]
    mine = owner.__dict__["from_pretrained"]

    def wrapper(cls, *args, **kwargs):
        return mine.__func__(cls, *args, **kwargs)

    owner.from_pretrained = classmethod(wrapper)
    hf_longctx.install()
    with pytest.raises(ConfigError, match=f"{owner.__name__}.from_pretrained was replaced"):
        hf_longctx.uninstall()
    LlamaForCausalLM.from_pretrained(folder, longctx=False)
    owner.from_pretrained = mine
    assert [one.__dict__["from_pretrained"] for one in OWNERS] == ours, "the failed uninstall changed nothing"


def test_a_failed_load_does_not_switch_the_flag_off(model, folder, installed):
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(folder / "nowhere", longctx="auto")
    with pytest.raises(ConfigError):
        AutoModelForCausalLM.from_pretrained(folder, longctx={"model": 1})
    assert run(LlamaForCausalLM.from_pretrained(folder, longctx=config_for(model)))[1] is LongCtxCache


# A config.json that somebody else made.


BAD = {
    "a path as store": {"stores": {"streaming": {"store": "../../x"}}},
    "a module as store": {"stores": {"streaming": {"store": "os"}}},
    "a dotted store": {"stores": {"retrieval": {"store": "full.os"}}},
    "a hidden file": {"stores": {"retrieval": {"store": "__init__"}}},
    "a base class": {"stores": {"retrieval": {"store": "base"}}},
    "a module as pattern": {"prefill": {"retrieval": {"pattern": "subprocess"}}},
    "a module as selector": {"decode": {"retrieval": {"select": "antigravity"}}},
    "a module as kernel": {"kernel": "antigravity"},
    "a file to extend": {"extends": "/etc/passwd"},
    "a number as store": {"stores": {"streaming": {"store": 7}}},
    "an unknown section": {"__class__": {"__reduce__": "os.system"}},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_malicious_config_is_data(model, folder, bad):
    rewrite(folder, longctx=config_for(model).to_dict() | BAD[bad])
    loaded = set(sys.modules)
    with pytest.raises(ConfigError, match="config.longctx of the model"):
        AutoModelForCausalLM.from_pretrained(folder)
    news = {name for name in set(sys.modules) - loaded if not name.startswith(("torch", "transformers"))}
    assert not news, "a config can make nothing be imported"
    assert run(AutoModelForCausalLM.from_pretrained(folder, longctx=False)) == run(model)


@pytest.mark.parametrize("bad", ["os", "auto", "../../x.yaml", 1, True, [], ["os"], {}])
def test_a_config_that_is_no_mapping(model, folder, bad):
    rewrite(folder, longctx=bad)
    with pytest.raises(ConfigError, match="config.longctx of the model"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert run(AutoModelForCausalLM.from_pretrained(folder, longctx=False)) == run(model)


def test_false_in_the_config_is_no_config(model, folder):
    rewrite(folder, longctx=False)
    assert run(AutoModelForCausalLM.from_pretrained(folder)) == run(model)


def test_a_config_of_another_model_is_refused(folder):
    other = tiny_model("llama", kv_heads=2)
    rewrite(folder, longctx=config_for(other).to_dict())
    with pytest.raises(ConfigError, match="made for another model"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="made for another model"):
        AutoModelForCausalLM.from_pretrained(folder, longctx=LongCtxConfig.from_dict(config_for(other).to_dict()))


def test_a_model_with_two_texts_inside_is_loaded_as_it_is():
    """As MusicGen, which reads one and writes another: it has no text config of which one could ask for the flag."""
    config = PreTrainedConfig()
    config.text_encoder, config.decoder = LlamaConfig(), LlamaConfig()
    model = SimpleNamespace(config=config)
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        model.config.get_text_config()
    assert loading._load(lambda: model, (), {}, None) is model
