"""The plugin of vLLM as far as it goes without vLLM: roles from a config, what is refused, and what it imports."""

from __future__ import annotations

import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_longctx.config.config import LongCtxConfig, load_shipped
from hf_longctx.errors import ConfigError, UnsupportedModeError, UnsupportedModelError
from hf_longctx.serving.vllm import plugin
from hf_longctx.serving.vllm.roles import HeadRoles, head_roles, refuse
from hf_longctx.serving.vllm.run import refuse_layer, refuse_run

NAME = "llama-3.1-8b-instruct"
MODEL = load_shipped(NAME).model.as_model()
SINKS = HeadRoles(("RS",), 4, 16)
NONE = HeadRoles(("RS",), 0, 16)
DENSE = HeadRoles(("RR",), 4, 16)


@pytest.mark.quick
@pytest.mark.parametrize("named", ["auto", NAME, "meta-llama/Llama-3.1-8B-Instruct"])
def test_roles_are_those_of_the_config(named):
    roles = head_roles(named, MODEL)
    assert roles.rows == load_shipped(NAME).roles()
    assert (roles.sink, roles.recent) == (64, 256)
    assert str(roles) == "128 of 256 KV heads cache every token, 128 the first 64 and the latest 256"


def test_no_sinks_only_where_the_config_says_so(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {NAME}\nstores: {{streaming: {{store: sink_recent, sink: 0, recent: 300}}}}\n")
    assert str(head_roles(str(path), MODEL)).endswith("128 the latest 300")
    assert all(load_shipped(name).stores.streaming.sink for name in (NAME, "tiny-llama"))


def test_the_config_in_a_model_s_config_json():
    model = SimpleNamespace(
        **vars(MODEL), longctx=load_shipped(NAME).override(stores={"streaming": {"sink": 9}}).to_dict()
    )
    assert head_roles("auto", model).sink == 9


def test_a_config_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="another model"):
        head_roles("qwen3-8b", MODEL)


WRONG = {
    "stores.retrieval.store": {"stores": {"retrieval": {"store": "quantized"}}},
    "stores.streaming.store": {"stores": {"streaming": {"store": "sink_recent_compensated"}}},
    "prefill.retrieval": {"prefill": {"retrieval": {"pattern": "vertical_slash"}}},
    "prefill.streaming.dense_tail": {"prefill": {"streaming": {"dense_tail": 64}}},
    "decode.retrieval.select": {"decode": {"retrieval": {"select": "page_bounds"}}},
    "kernel": {"kernel": "stock"},
    "model.full_attention_layers": {"model": {"full_attention_layers": list(range(31))}},
}


@pytest.mark.parametrize("key", WRONG)
def test_what_it_does_not_do_is_refused_by_its_key(key):
    config = load_shipped(NAME)
    refuse(config)  # a control
    with pytest.raises(UnsupportedModeError, match=f"^{key}: got .* What works: "):
        refuse(config.override(**WRONG[key]))


def test_a_table_of_patterns_is_refused():
    table = {"budgets": [{"pattern": "vertical_slash"}], "map": [[0] * 32] * 32}
    config = load_shipped(NAME).override(prefill={"tables": {"own": table}})
    refuse(config)  # no pattern uses it
    with pytest.raises(UnsupportedModeError, match="table own"):
        refuse(config.override(prefill={"retrieval": {"table": "own"}}))


def test_every_section_that_changes_what_is_computed_is_looked_at():
    """A new section or role of a config must be read or refused here too."""
    assert set(LongCtxConfig.__dataclass_fields__) == {"model", "heads", "stores", "prefill", "decode", "kernel"}
    config = load_shipped(NAME)
    assert set(type(config.stores).__dataclass_fields__) == {"retrieval", "streaming"}
    assert set(type(config.decode).__dataclass_fields__) == {"retrieval"}
    assert set(type(config.stores.streaming).__dataclass_fields__) == {"sink", "recent"}
    assert not type(config.stores.retrieval).__dataclass_fields__
    assert set(type(config.prefill.streaming).__dataclass_fields__) == {"dense_tail"}
    assert (
        not type(config.prefill.retrieval).__dataclass_fields__
        and not type(config.decode.retrieval).__dataclass_fields__
    )


def run(**changed):
    """What `refuse_run` reads of a ``VllmConfig``, as it is where everything works with sinks."""
    parts = {
        "parallel_config": {"world_size": 1, "data_parallel_size": 1, "decode_context_parallel_size": 1},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "model_config": {"runner_type": "generate"},
    }
    for key, value in changed.items():
        next((part for part in parts.values() if key in part), parts)[key] = value
    plain = {"speculative_config": None, "kv_transfer_config": None, "lora_config": None}
    return SimpleNamespace(
        **{**plain, **{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in parts.items()}}
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"world_size": 2}, "tensor and pipeline parallel"),
        ({"decode_context_parallel_size": 2}, "context parallel"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"lora_config": object()}, "LoRA"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"data_parallel_size": 2}, "data parallel"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
    ],
)
@pytest.mark.parametrize("roles", [SINKS, NONE, DENSE], ids=str)
def test_a_run_that_is_not_tried_is_refused(changed, said, roles):
    refuse_run(run(), roles, on_cpu=True)  # a control
    with pytest.raises(UnsupportedModeError, match=f"{said}.* What works: "):
        refuse_run(run(**changed), roles, on_cpu=True)


def test_sinks_need_a_cpu():
    with pytest.raises(UnsupportedModeError, match="sinks have no attention on this device"):
        refuse_run(run(), SINKS, on_cpu=False)
    for roles in (NONE, DENSE):
        refuse_run(run(), roles, on_cpu=False)


def layer(**changed):
    own = {"alibi_slopes": None, "logits_soft_cap": 0} | {
        k: v for k, v in changed.items() if k[:5] in ("alibi", "logit")
    }
    plain = {
        "sliding_window": None,
        "has_sink": False,
        "kv_sharing_target_layer_name": None,
        "attn_type": "decoder",
        "kv_cache_dtype": "auto",
    }
    return SimpleNamespace(layer_name="model.layers.3", impl=SimpleNamespace(**own), **{**plain, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sliding_window": 4096}, "a sliding window"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "soft-capped scores"),
        ({"has_sink": True}, "learned sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.2"}, "KV of another layer"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"attn_type": "encoder_only"}, "attention of an encoder_only"),
    ],
)
def test_a_layer_that_is_more_is_refused(changed, said):
    refuse_layer(layer())  # a control
    with pytest.raises(UnsupportedModelError, match=f"model.layers.3 has {said}"):
        refuse_layer(layer(**changed))


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_does_nothing_unless_asked(value, monkeypatch):
    """Without vLLM, or with it: nothing is even imported."""
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(plugin.SWITCH, value)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert plugin.register() is None
    monkeypatch.setenv(plugin.SWITCH, "auto")
    with pytest.raises(ImportError):  # a control
        plugin.register()


def test_1_names_no_config(monkeypatch):
    monkeypatch.setenv(plugin.SWITCH, "1")
    with pytest.raises(ConfigError, match="HF_LONGCTX_VLLM: got 1. What works: auto"):
        plugin.register()


def test_the_script_that_compares_tokens_mixes_roles():
    """Beside vLLM it cannot run here; its config can be made, and both roles stand in most layers."""
    made = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "vllm" / "check.py"))["config"]
    config = LongCtxConfig.from_dict(made(load_shipped(NAME).to_dict()["model"], 5, 50))
    refuse(config)
    assert all(set(row) == {"R", "S"} for row in config.roles())
    assert 0.3 < config.retrieval_heads / config.kv_heads < 0.4


def test_neither_transformers_nor_vllm_is_imported():
    """vLLM pins a Transformers that need not be ours; the plugin itself costs the others nothing, not even torch."""
    script = textwrap.dedent("""
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("transformers", "accelerate", "vllm", "huggingface_hub"):
                    raise ImportError(f"blocked: {name}")

        sys.meta_path.insert(0, Blocked())
        from hf_longctx.serving.vllm import plugin

        assert plugin.register() is None and "torch" not in sys.modules
        from hf_longctx.config.config import load_shipped
        from hf_longctx.serving.vllm import run, window
        from hf_longctx.serving.vllm.roles import head_roles

        config = load_shipped("qwen3-8b")
        assert head_roles("auto", config.model.as_model()).rows == config.roles()
        try:
            import hf_longctx.model.patch
        except ImportError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blocked: "), "a control: nothing was blocked"
