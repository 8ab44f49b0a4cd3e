"""A small patched model, a forward over its cache, and the memory that is alive."""

from __future__ import annotations

import gc

import torch

from helpers.tiny import config_for, tiny_model
from hf_longctx import patch_model


def patched_tiny(roles="mixed", sink=4, recent=16, **kwargs):
    model = tiny_model("llama", torch.float64, **kwargs)
    return patch_model(model, config_for(model, roles, sink, recent))


def read(model, cache, ids, mask=None) -> torch.Tensor:
    """Feed new tokens; the logits of the last one."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


def live_bytes() -> int:
    """Bytes of the distinct storages of all living tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())
