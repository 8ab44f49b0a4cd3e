"""What continuous batching of a patched model stands on in Transformers, from 5.24 on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

generation = pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")

from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import cache as caches  # noqa: E402
from transformers.generation.continuous_batching import continuous_api as api  # noqa: E402
from transformers.generation.continuous_batching import input_outputs, scheduler, utils  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

from hf_longctx.model.attention import KNOWN  # noqa: E402
from hf_longctx.model.hooks import OF_BATCHING  # noqa: E402

RELIES = "hf_longctx relies on this: "


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_a_manager_is_made_of_these() -> None:
    assert names(api.ContinuousMixin.init_continuous_batching) == [
        "self",
        "generation_config",
        "continuous_batching_config",
        "workload_hints",
    ]
    assert names(api.ContinuousBatchingManager.__init__)[1] == "model"
    assert set(names(api.ContinuousBatchProcessor.__init__)) == {
        *("self", "cache", "config", "generation_config", "continuous_batching_config", "logit_processor"),
        *("input_queue", "cancel_queue", "output_router", "background_thread_status", "model_device", "model_dtype"),
        *("scheduler", "distributed_helper"),
    }
    source = inspect.getsource(api.ContinuousBatchingManager)
    for method in ("self.switch_to_cb_friendly_attn(model", "self._create_batch_processor()"):
        assert method in source, RELIES + f"the manager calls {method}, which is replaced"
    assert "_cached_continuous_batching_manager" in source, RELIES + "where a manager is kept for the next session"


def test_a_scheduler_says_what_it_could_not_place() -> None:
    assert names(scheduler.Scheduler.add_waiting_request) == ["self", "state"]
    assert names(scheduler.Scheduler.schedule_batch) == ["self", "token_budget", "cache_budget"]
    for one in scheduler.SCHEDULER_MAPPING.values():
        assert "return None," in inspect.getsource(one.schedule_batch), RELIES + "None first: no request has room"
        assert "block_new_requests" in inspect.getsource(one.schedule_batch)
    assert "self.starved_requests.append((state, request_len))" in inspect.getsource(scheduler.Scheduler)
    processor = inspect.getsource(api.ContinuousBatchProcessor._update_tp_group_state)
    taken = processor[processor.index("self.scheduler.add_waiting_request(state)") :]
    assert "self._handle_request_error(e, state)" in taken, RELIES + "what a scheduler refuses ends alone"


def test_an_allocator_must_have_these() -> None:
    assert generation.CacheAllocator.__abstractmethods__ == {
        *("register_cache_tensor", "needs_new_blocks", "allocate_cache_to_request", "get_seqlen_k"),
        *("get_read_indices", "get_write_indices", "fill_block_table", "update", "get_cache_for_block_table"),
    }
    assert names(generation.CacheAllocator._before_cache_tensor_init)[1:] == [
        *("index", "layer_indices", "tokens_per_page", "bytes_per_page", "allow_block_sharing"),
    ]
    assert names(generation.CachePool.__init__)[1:] == ["num_sectors", "num_allocators", "num_reserved_sectors"]


def test_no_masks_are_made_for_another_attention_word() -> None:
    config = LlamaConfig()
    config._attn_implementation = "longctx"
    assert not utils.attn_mask_is_needed(config)
    assert "self.num_attention_masks" in inspect.getsource(caches.PagedAttentionMemoryHandler.attention_mask_bytes)


def test_every_argument_of_a_step_is_known_or_taken_out() -> None:
    given = set(input_outputs.PagedAttentionArgs.__annotations__)
    left = given - KNOWN - set(OF_BATCHING)
    assert left == {"input_ids", "attention_mask", "cache"}, RELIES + f"a step gives the model {sorted(given)}"


class Noting(caches.PagedAttentionCache):
    """Notes what it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[tuple] = []
        self.shapes: list[tuple] = []

    def extend_read_and_write_indices(self, request_id, past, new, read_index, write_index) -> None:
        self.noted.append((request_id, past, new, not write_index[0]))
        super().extend_read_and_write_indices(request_id, past, new, read_index, write_index)

    def update(self, key_states, value_states, layer_idx, kwargs):
        self.shapes.append((tuple(key_states.shape), layer_idx))
        return super().update(key_states, value_states, layer_idx, kwargs=kwargs)


def test_a_step_names_its_requests_in_the_order_of_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step begins with empty lists, which is how a cache knows that it is another one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM(config).eval()
    made: list[Noting] = []

    def new(*args: Any, **kwargs: Any) -> Noting:
        made.append(Noting(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(api, "PagedAttentionCache", new)
    asked = ContinuousBatchingConfig(page_size=16, num_blocks=20, max_batch_tokens=64, auto_switch_to_flash=False)
    greedy = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    model.generate_batch([[1, 2, 3], [4] * 70], generation_config=greedy, continuous_batching_config=asked)
    (cache,) = made
    starts = [at for at, (*_, first) in enumerate(cache.noted) if first]
    assert starts[0] == 0 and len(starts) > 3, RELIES + "the lists of a step are new ones"
    steps = [cache.noted[low:high] for low, high in zip(starts, [*starts[1:], len(cache.noted)], strict=True)]
    widths = [sum(new for _, _, new, _ in step) for step in steps]
    assert [shape[2] for shape, layer in cache.shapes if layer == 0] == widths
    assert all(shape[:2] == (1, 1) and shape[3] == 16 for shape, _ in cache.shapes), "k and v are [1, H_kv, T, D]"
    assert max(widths) <= 64 and any(len(step) == 2 for step in steps)


def test_a_paged_cache_gets_no_mask_made() -> None:
    made = object.__new__(caches.PagedAttentionCache)
    mask = create_causal_mask(LlamaConfig(), torch.zeros(1, 3, 8), None, cache=made)
    assert mask is None, RELIES + "the attention of a step gets attention_mask=None"
