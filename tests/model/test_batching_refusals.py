"""What continuous batching of a patched model is refused for; what each message says to do works."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from helpers.batches import SMALL, alone, batched, greedy, no_collection, patched, prompts, tokens  # noqa: F401
from helpers.every_family import Case
from helpers.every_family import tiny_model as any_model
from helpers.tiny import config_for, tiny_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import CompileConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_longctx import ConfigError, UnsupportedModeError, observe, patch_model, unpatch_model
from hf_longctx.model.batched import check_config
from hf_longctx.model.batching import KEPT
from hf_longctx.model.modules import language_model

pytestmark = pytest.mark.usefixtures("no_collection")
GIVEN = prompts(40, 9)


def refused(what: str, call: Callable, error: type[Exception] = UnsupportedModeError) -> str:
    with pytest.raises(error, match=what) as caught:
        call()
    return str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("role", "store", "right"),
    [
        ("retrieval", {"store": "quantized"}, "full"),
        ("retrieval", {"store": "offloaded"}, "full"),
        ("streaming", {"store": "sink_recent_compensated"}, "sink_recent"),
    ],
    ids=["quantized", "offloaded", "sink_recent_compensated"],
)
def test_other_stores(role, store, right):
    model = patched(top={"stores": {role: store}})
    said = refused(rf"stores.{role} \({store['store']}\) in layer 0", lambda: batched(model, GIVEN))
    assert said.endswith(f"Set stores={{'{role}': {{'store': '{right}'}}}}, or use generate().")
    wanted = alone(model, GIVEN)
    patch_model(model, stores={role: {"store": right}})
    assert len(tokens(batched(model, GIVEN))) == len(wanted) == 2


def test_a_store_of_a_role_that_has_no_heads_is_not_asked():
    model = patched("streaming", top={"stores": {"retrieval": {"store": "quantized"}}})
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


def test_selections_of_decoded_tokens():
    model = patched(top={"decode": {"retrieval": {"select": "page_bounds", "dense_layers": 0}}})
    said = refused(r"decode.retrieval \(page_bounds\)", lambda: batched(model, GIVEN))
    assert "{'select': 'dense'}" in said
    patch_model(model, config_for(model, decode={"retrieval": {"select": "dense"}}))
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


def test_windows_of_the_models_own():
    model = tiny_model("mistral", sliding=12, layers=2)
    patch_model(model, config_for(model))
    said = refused(r"sliding-window layers \(layer 0: 12 tokens\)", lambda: batched(model, GIVEN))
    assert said.endswith("Use generate() with a padded batch.")
    assert len(alone(model, GIVEN)) == 2


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next", "llama4_text"])
def test_layers_that_cache_no_keys(model_type):
    model = any_model(Case(model_type, True))
    patch_model(model, config_for(language_model(model)))
    said = refused("1 of 2 layers cache keys: the others' states have no pages", lambda: batched(model, GIVEN))
    assert said.endswith("Use generate() with a padded batch.")


def test_rotations_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model(rope_parameters=rope, layers=2)
    patch_model(model, config_for(model))
    refused("continuous batching with rope_type 'dynamic': angles depend on the length", lambda: batched(model, GIVEN))


def test_several_processes():
    model = patched()
    call = [model.config, ContinuousBatchingConfig(), 2]
    refused(r"over 2 processes \(tensor parallel\)", lambda: check_config(*call, 2))
    check_config(*call, 1)


OFF = {
    "use_async_batching": (True, False),
    "use_cuda_graph": ((True, False), (False, False)),
    "q_padding_interval_size": (64, 0),
    "kv_padding_interval_size": (64, 0),
    "varlen_compile_config": (CompileConfig(), None),
    "decode_compile_config": (CompileConfig(), None),
    "default_compile_level": (1, 0),
    "max_blocks_per_request": (8, 0),
    "cpu_offload_space": (1.0, 0.0),
}


@pytest.mark.parametrize("field", OFF)
def test_fixed_shapes_and_pages_elsewhere(field):
    wrong, right = OFF[field]
    model = patched()
    said = refused(rf"ContinuousBatchingConfig\({field}=", lambda: batched(model, GIVEN, **{field: wrong}))
    assert said.endswith(f"Leave {field} out.")
    model.init_continuous_batching(greedy(), ContinuousBatchingConfig(**SMALL, **{field: right}))


def test_host_memory_of_any_size():
    """``None`` would take most of it."""
    said = refused(r"cpu_offload_space=None", lambda: batched(patched(), GIVEN, cpu_offload_space=None))
    assert said.endswith("Leave cpu_offload_space out.")


def test_an_unknown_scheduler():
    refused(
        r"scheduler_type='lifo'\); known: fifo, prefill_first\.",
        lambda: batched(patched(), GIVEN, scheduler_type="lifo"),
        ConfigError,
    )


def test_beams():
    model = patched()
    said = refused("num_beams=4: it searches no beams", lambda: batched(model, GIVEN, generation={"num_beams": 4}))
    assert said.endswith("Set num_beams=1, or use generate().")
    assert tokens(batched(model, GIVEN, generation={"num_beams": 1})) == alone(model, GIVEN)


def test_pads_are_no_tokens():
    """generate(cache_implementation="paged") takes a tensor, and Transformers does not look at its mask."""
    model = patched()
    ids = torch.tensor(prompts(9, 9))
    mask = torch.ones_like(ids)
    asked = {"max_new_tokens": 4, "do_sample": False, "generation_config": greedy()}
    asked["generation_config"].continuous_batching_config = ContinuousBatchingConfig(**SMALL)
    found = model.generate(ids, attention_mask=mask, cache_implementation="paged", **asked)
    assert torch.equal(found[0], model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
    mask[0, :3] = 0
    said = refused(
        "padded rows: continuous batching sees no attention_mask",
        lambda: model.generate(ids, attention_mask=mask, cache_implementation="paged", **asked),
    )
    assert said.endswith("Call model.generate_batch with a list of prompts without pads.")
    unpadded = [ids[0, 3:].tolist(), ids[1].tolist()]
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, 9:]
    assert tokens(batched(model, unpadded, 4)) == wanted.tolist()


def test_an_observer():
    model = patched()
    with observe(model, lambda *shown: None):
        refused("continuous batching under observe", lambda: batched(model, GIVEN))
    assert tokens(batched(model, GIVEN)) == alone(model, GIVEN)


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_of_peft(method):
    """Transformers would leave them out without a word."""
    model = tiny_model(layers=2)
    wrapped = get_peft_model(model, method(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    patch_model(wrapped, config_for(model))
    said = refused("puts 4 virtual tokens before every sequence", lambda: batched(wrapped, GIVEN))
    assert said.endswith("Use generate().")


def test_adapters_of_the_weights_run():
    torch.manual_seed(0)
    model = tiny_model(layers=2)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora).eval()
    patch_model(wrapped, config_for(model))
    found = []
    for off in (contextlib.nullcontext, wrapped.disable_adapter):
        with off():
            found.append(tokens(batched(wrapped, GIVEN)))
            assert found[-1] == [
                wrapped.generate(input_ids=torch.tensor([one]), max_new_tokens=8, do_sample=False)[
                    0, len(one) :
                ].tolist()
                for one in GIVEN
            ]
    assert found[0] != found[1]


def test_a_manager_from_before_the_patch():
    model = tiny_model(layers=2)
    batched(model, GIVEN, persistent=True)
    patch_model(model, config_for(model))
    said = refused("from before it was patched", lambda: batched(model, GIVEN))
    assert "model.destroy_cached_continuous_batching_manager() first" in said
    model.destroy_cached_continuous_batching_manager()
    assert tokens(batched(model, GIVEN, persistent=True)) == alone(model, GIVEN)
    unpatch_model(model)
    assert KEPT not in vars(model)
