"""Stores of pages on a GPU: the answers of ``store: full``, and device memory that does not grow with the context."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.paged_cases import WORDS
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import LongCtxCache, patch_model

CUDA = torch.device("cuda")


def model_with(retrieval: dict, roles: str = "retrieval"):
    torch.manual_seed(1)
    model = tiny_model("llama", torch.float32, layers=4, head_dim=64)
    stores = {"retrieval": retrieval, "streaming": {"store": "sink_recent", "sink": 4, "recent": 16}}
    return patch_model(model, config_for(model, roles, stores=stores)).to(CUDA)


@torch.no_grad()
def read(model, cache, ids, mask) -> torch.Tensor:
    return model(ids.to(CUDA), attention_mask=mask.to(CUDA), past_key_values=cache, logits_to_keep=1).logits


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lengths", [[500, 500], [500, 130]])
def test_pages_answer_like_the_full_store(word, lengths):
    """Chunks, tokens one by one, rollback, beams and copies, with the order of copies that real streams give."""
    (ids, padded), outs = left_padded(lengths), []
    for retrieval in ({"store": word, "page": 16, "recent": 20}, {"store": "full"}):
        model = model_with(retrieval, "mixed")
        cache, done, seen, mask = LongCtxCache(model), 0, [], padded
        for count in (200, 7, 93, *[1] * 100):
            done += count
            seen.append(read(model, cache, ids[:, done - count : done], mask[:, :done]))
        cache.crop(-30)
        done -= 30
        cache.reorder_cache(torch.tensor([1, 1], device=CUDA))
        mask = padded[[1, 1]]
        cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        for _ in range(60):
            done += 1
            seen.append(read(model, cache, ids[:, done - 1 : done], mask[:, :done]))
        outs.append(torch.cat(seen, 1))
    torch.testing.assert_close(*outs, rtol=0, atol=2e-3)
    assert (outs[0][:, 1:] - outs[1][:, :-1]).abs().max() > 0.1, "a control"


@pytest.mark.parametrize("word", WORDS)
def test_device_memory_does_not_grow_with_the_context(word):
    ids = torch.randint(3, 97, (1, 40_000))
    mask = torch.ones_like(ids)
    held = {}
    for retrieval in ({"store": word, "page": 256, "recent": 256}, {"store": "full"}):
        model = model_with(retrieval)
        cache = LongCtxCache(model)
        before = torch.cuda.memory_allocated()
        for low in range(0, 39_936, 512):
            read(model, cache, ids[:, low : low + 512], mask[:, : low + 512])
        torch.cuda.reset_peak_memory_stats()
        for at in range(39_936, 39_946):
            read(model, cache, ids[:, at : at + 1], mask[:, : at + 1])
        held[retrieval["store"]] = torch.cuda.max_memory_allocated() - before
    slot = 2 * 4 * 64 * 4
    assert held["full"] > 4 * 39_936 * slot
    assert held[word] < 4 * (512 + 256) * slot + 8 * 256 * slot + 2**22
