"""A decoded token over a context that does not fit into memory: half of the heads stream, the others lie on disk.

    python examples/million_tokens.py --tokens 1000000

The layers have the shape of Llama-3.2-1B and random weights, and the cache is filled with random keys and values, chunk
by chunk, as a prompt would fill it. Then tokens are decoded through the attention of every layer: the retrieval heads
fetch only the pages that ``page_bounds`` chooses. Memory is what the process holds itself, without the system's cache
of files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from hf_longctx.bench.columns import make_model, random_heads
from hf_longctx.bench.settings import Settings
from hf_longctx.cache.cache import LongCtxCache
from hf_longctx.config.config import LongCtxConfig
from hf_longctx.layout.forward import Forward, ForwardLog
from hf_longctx.layout.rows import Rows
from hf_longctx.model.attention import attend
from hf_longctx.model.patch import patch_model

CHUNK = 16384  # tokens of a forward that fills the cache


@torch.no_grad()
def main() -> None:
    options = arguments()
    settings = Settings(tokens=(options.tokens,), layers=options.layers)
    cache, modules = filled(options, settings)
    log = ForwardLog()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        for layer, module in enumerate(modules):
            q, k, v = (random_heads(n, 1, settings, torch.bfloat16) for n in (32, 8, 8))
            if layer == 0:
                cache.begin(Forward(Rows(1, cache.seen, 1), log, cached=True, steps=True))
            kept = cache.update(k, v, layer)
            attend(module, q, *kept, None, scaling=module.scaling)
        times.append(time.perf_counter() - start)
    told = {
        "tokens": options.tokens,
        "layers": options.layers,
        "first token s": round(times[0], 3),
        "token s": [round(one, 3) for one in times[1:]],
        "read": round(log.decode.share, 4),
        "cache in memory MB": round(cache.nbytes / 1e6),
        "on disk MB": round(cache.nbytes_offloaded["on disk"] / 1e6),
        "dense MB": round(cache.nbytes_dense / 1e6),
        "process MB": memory(),
    }
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


def filled(options: argparse.Namespace, settings: Settings) -> tuple[LongCtxCache, list]:
    """A cache that has seen the tokens, and the attention modules of its layers."""
    model = make_model(settings, torch.bfloat16, "meta")
    disk = {"store": "offloaded_disk", "page": options.page, "recent": 1024, "folder": options.folder}
    config = {
        "model": LongCtxConfig.describe(model.config),
        "heads": {"roles": settings.half_streaming()},
        "stores": {"retrieval": disk, "streaming": {"store": "sink_recent", "sink": 64, "recent": 256}},
        "decode": {"retrieval": {"select": "page_bounds", "dense_layers": 0, "refresh": options.refresh}},
    }
    cache = LongCtxCache(patch_model(model, config))
    torch.manual_seed(0)
    for low in range(0, options.tokens, CHUNK):
        new = min(CHUNK, options.tokens - low)
        k, v = (random_heads(8, new, settings, torch.bfloat16) for _ in "kv")
        for layer in range(settings.layers):
            cache.update(k, v, layer)
        sys.stderr.write(f"\r{low + new} tokens, {memory()} MB ")
    return cache, [layer.self_attn for layer in model.model.layers]


def memory() -> int:
    """MB that this process holds itself: what is mapped from files is not counted."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--page", type=int, default=8192, help="tokens of a file")
    parser.add_argument("--refresh", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="decoded tokens")
    parser.add_argument("--folder", help="where the files are put, for a while")
    return parser.parse_args()


if __name__ == "__main__":
    main()
