"""Compiles the Triton kernels for two GPUs, of which none is needed, and prints as JSON what came out.

The library's own functions run, on CPU tensors; each launch only compiles. So the arguments are the real ones.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from helpers.calls import decode, sparse, streaming
from hf_longctx.kernels import _triton_tiles, triton
from hf_longctx.kernels._quantized import Quantised
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.segments import Segment

SHARED = {80: 166912, 90: 232448}  # bytes a program may have on an A100, on an H100
LENGTHS = [(66, 130, 2), (1, 1, 1), (64, 64, 1), (129, 300, 1), (16, 1040, 3)]  # queries, keys, batch


class Device:
    """What the launcher asks of a driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def launch_everything(head_dim, dtype, q_len, kv_len, batch):
    def make(*shape):
        return torch.zeros(shape, dtype=dtype)

    q, k, first = make(batch, 8, q_len, head_dim), make(batch, 2, kv_len, head_dim), kv_len - q_len
    query_blocks, key_blocks = -(-kv_len // 64) - first // 64, -(-kv_len // 64)
    every = torch.ones(batch, 8, query_blocks, key_blocks, dtype=torch.bool)
    columns = torch.rand(batch, 8, kv_len) < 0.2
    sparse(triton, q, k, k, BlockList.from_mask(every, columns, block=64, first=first, kv_len=kv_len), 0.1)
    sinks, band = k[:, :, :4], k[:, :, 4:]
    streaming(triton, q, sinks, sinks, band, band, recent=kv_len // 2 + 1, first=sinks.shape[2], scale=0.1)
    ragged = Segment(k, k, torch.full([batch], kv_len), torch.zeros(kv_len))
    decode(triton, q[:, :, :1], [Segment(k, k, kv_len), ragged], 0.1)
    slots = -(-kv_len // 64) * 64
    packed = Quantised.empty(k, k, 2, slots, 4, 64, 0).seen([slots], None)
    decode(triton, q[:, :, :1], [packed, Segment(k, k, kv_len), ragged], 0.1)


def built(capability, head_dim, dtype, lengths):
    """The kernels that these launches compiled, by name."""
    found = defaultdict(dict)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[self.__name__][id(kernel)] = kernel
        return kernel

    JITFunction.run, _triton_tiles.CPU_SHARED = compile_only, SHARED[capability]
    driver.set_active(Device(capability))
    try:
        for one in lengths:
            launch_everything(head_dim, dtype, *one)
    finally:
        JITFunction.run = run
    return {name: list(kernels.values()) for name, kernels in found.items()}


def told(kernels):
    ptx = kernels[0].asm["ptx"]
    return {
        "variants": len(kernels),
        "shared": kernels[0].metadata.shared,
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "async_copies": ptx.count("cp.async.c"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = []
    for capability, head_dim, lengths in ((80, 256, LENGTHS[:1]), (90, 128, LENGTHS)):
        kernels = {name: told(some) for name, some in built(capability, head_dim, torch.bfloat16, lengths).items()}
        out.append({"capability": capability, "head_dim": head_dim, "limit": SHARED[capability], "kernels": kernels})
    json.dump(out, sys.stdout)
