"""Patched models whose decoding runs by the Triton kernels, and how often those are launched. For any device."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from tiny import config_for, left_padded, tiny_model

from hf_longctx import LongCtxCache, patch_model, report
from hf_longctx.kernels import _triton_decode, triton

LAYERS, STEPS = 3, 3
KERNELS = ("decode_kernel", "merge_kernel")


@contextmanager
def launches():
    """Counts the launches of the kernels of decode, by name."""
    counts, kernels = Counter(), {name: getattr(_triton_decode, name) for name in KERNELS}

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                counts[self.name] += 1
                return kernels[self.name][grid](*args, **kwargs)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(_triton_decode, name, Counted(name))
        yield counts


@torch.no_grad()
def decoded(model, kernel, lengths, recent=8):
    """Logits ``[STEPS, B, vocabulary]`` of tokens decoded after prompts of these lengths, and what was launched."""
    config = config_for(model, "mixed", sink=4, recent=recent, kernel=kernel)
    ids, mask = (t.to(model.device) for t in left_padded([length + STEPS for length in lengths]))
    patch_model(model, config)
    cache, total = LongCtxCache(model), ids.shape[1] - STEPS
    model(ids[:, :total], attention_mask=mask[:, :total], past_key_values=cache)
    outs = []
    with launches() as counts:
        for end in range(total + 1, total + STEPS + 1):
            step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            outs.append(step.logits[:, -1].double())
    assert kernel in str(report(model))
    return torch.stack(outs), counts


def one_launch_per_layer(device, dtype):
    """As right as the cpu kernel, one launch per layer and token, padded rows included."""
    model, exact = (tiny_model("llama", one, layers=LAYERS).to(device) for one in (dtype, torch.float64))
    exact.load_state_dict(model.state_dict())
    for lengths in ([40], [40, 23, 1]):

        def run(*args, lengths=lengths, **kwargs):
            torch.manual_seed(0)
            return decoded(*args, lengths=lengths, **kwargs)

        want, none = run(exact, "reference")
        got, counts = run(model, "triton")
        assert not none
        assert counts == dict.fromkeys(KERNELS, LAYERS * STEPS)
        allowed = max(1e-5, 2 * float((run(model, "cpu")[0] - want).abs().max()))
        assert (got - want).abs().max() <= allowed
        assert (run(exact, "reference", recent=7)[0] - want).abs().max() > 2 * allowed, "a control"
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(triton, "decode_layer")
            by_role, counts = run(model, "triton")
        assert counts == dict.fromkeys(KERNELS, 2 * LAYERS * STEPS), "a control: role by role"
        assert (by_role - want).abs().max() <= allowed
