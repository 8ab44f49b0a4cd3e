"""Patched models and the benchmark of GPUs, run by the Triton kernels, and how often those are launched. Any device."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from helpers.tiny import config_for, left_padded, tiny_model
from hf_longctx import LongCtxCache, LongCtxError, patch_model, report
from hf_longctx.bench import gpu, gpu_clock
from hf_longctx.bench.gpu_settings import GpuSettings
from hf_longctx.bench.measure import quiet
from hf_longctx.kernels import _triton_decode, triton

LAYERS, STEPS = 2, 2
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
    for lengths in ([20], [20, 11, 1]):

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
            patch.delattr(triton, "attend_layer")
            by_role, counts = run(model, "triton")
        assert counts == dict.fromkeys(KERNELS, 2 * LAYERS * STEPS), "a control: role by role"
        assert (by_role - want).abs().max() <= allowed


@torch.no_grad()
def forks(device, dtype):
    """Rows that share a prompt and go on from different tokens of it: one launch per layer, as right as alone."""
    model, exact = (tiny_model("llama", one, layers=LAYERS).to(device) for one in (dtype, torch.float64))
    exact.load_state_dict(model.state_dict())
    texts = left_padded([45, 40, 42])
    ids, mask = (t.to(device) for t in texts)
    ids[1, 5:37], ids[2, 3:35] = ids[0, :32], ids[0, :32]  # one prompt of 32 tokens, then 13, 8 and 10 of their own

    def run(one, kernel):
        patch_model(one, config_for(one, "mixed", sink=4, recent=8, kernel=kernel))
        cache = LongCtxCache(one)
        one(ids[:1, :32], past_key_values=cache)
        cache = cache.fork()
        cache.batch_repeat_interleave(3)
        cache.stagger([0, 5, 3])
        one(ids[:, 32:-STEPS], attention_mask=mask[:, :-STEPS], past_key_values=cache)
        outs = []
        with launches() as counts:
            for end in range(45 - STEPS + 1, 46):
                step = one(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
                outs.append(step.logits[:, -1].double())
        return torch.stack(outs), counts

    got, counts = run(model, "triton")
    assert counts == dict.fromkeys(KERNELS, LAYERS * STEPS)
    want, _ = run(exact, "reference")
    for row in range(3):
        alone = exact(ids[row, mask[row].bool()][None]).logits[0, -STEPS:].double()
        assert (want[:, row] - alone).abs().max() < 1e-6
    allowed = max(1e-5, 2 * float((run(model, "cpu")[0] - want).abs().max()))
    assert (got - want).abs().max() <= allowed
    assert (got - want.roll(1, 1)).abs().max() > 2 * allowed, "a control"


def benchmark(device, dtype):
    """`bench gpu` checks and times our kernels against the dense attention of the device, and notices a wrong one."""
    if device.type == "cuda":
        clock = gpu_clock.DeviceClock(device)
        assert gpu_clock.bandwidth(clock, clock.buffer) > 0
    else:
        clock = stopwatch
    word = "fp32" if dtype == torch.float32 else "bf16"
    shape = {"heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 1, "dtypes": (word,)}
    settings = GpuSettings(tokens=(130,), decode_tokens=(70,), densities=(40,), kernels=("triton",), **shape)
    with launches() as counts:
        prefill, decode = gpu.run(settings, device, clock)
    assert {"SDPA flash", "triton streaming", "triton blocks 40%"} <= set(prefill["columns"])
    ours = {f"triton {percent}% retrieval" for percent in (25, 50, 100)}
    assert ours | {"SDPA flash, group folded"} <= set(decode["columns"])
    assert counts == dict.fromkeys(KERNELS, 2 * len(ours)), "one launch for the check and one for the clock"
    with pytest.MonkeyPatch.context() as patch:
        right = triton.attend_layer
        patch.setattr(triton, "attend_layer", lambda *args: (right(*args)[0].roll(1, 1), None))
        with pytest.raises(LongCtxError, match="triton 100% retrieval differs"):
            gpu._decode(settings, word, 70, device, clock, quiet)


def stopwatch(work):
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)
