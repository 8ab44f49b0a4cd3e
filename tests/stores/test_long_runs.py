"""50 000 decoded tokens: constant memory for streaming heads, exact arithmetic for retrieval heads, constant work."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import read
from helpers.store_cases import CASES, ROUNDED, patched_case, role_of
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx import LongCtxCache
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.layout.streamed import Streamed
from hf_longctx.stores.base import Reserve
from hf_longctx.stores.full import Full

PROMPT, TOKENS = 500, 50_000
LARGER = {"page": 8192, "recent": 512}  # every step reads every page, so few of them
LOOKS = (1000, 25_000, 49_000)  # tokens, from which on the work of some steps is counted


class CountCalls(TorchDispatchMode):
    """Counts the operations torch runs."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def work_of_a_step(model, cache, token) -> int:
    with CountCalls() as count:
        read(model, cache, token)
    return count.calls


def bounds(spec, tokens: int) -> tuple[int, int]:
    """Least and most bytes of a head; where the data chose what is left of the prompt, what it left and all of it."""
    if spec.by_data:
        return spec.nbytes(PROMPT, 8, 4).device, Full().nbytes(tokens, 8, 4, Reserve()).device
    return tuple(spec.nbytes(tokens, 8, 4, reserve).device for reserve in (None, Reserve()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_long_run_keeps_its_bytes_its_work_and_its_answer(case):
    model = patched_case(case, torch.float32, layers=1, **(LARGER if "page" in CASES[case] else {}))
    ids = torch.randint(3, 97, (1, PROMPT + TOKENS))
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :PROMPT])
    (layer,) = cache.layers
    store = next(store for store in layer.stores if store.heads.role == role_of(case))
    spec, n, bytes_seen, work, pages = store.spec, len(store.heads.kv_heads), [], [], []
    for at in range(PROMPT, PROMPT + TOKENS):
        token = ids[:, at : at + 1]
        if at in LOOKS:
            # The least of some steps: now and then one also moves what it kept.
            work.append(min(work_of_a_step(model, cache, ids[:, i : i + 1]) for i in range(at, at + 9)))
            cache.crop(-9)
            pages.append(sum(len(getattr(segment, "entries", ())) for segment in store.segments.values()))
        out = read(model, cache, token)
        if at % 997 == 0:
            held = storage_bytes(store.tensors())
            held -= n * spec.nbytes(at + 1, 8, 4).host
            least, most = bounds(spec, at + 1)
            assert n * least <= held <= n * most
            bytes_seen.append(held)
    assert cache.seen == PROMPT + TOKENS
    if role_of(case) == "streaming" and spec.cached_tokens(10**6) == spec.cached_tokens(10**7):
        assert len(set(bytes_seen[3:])) == 1
    held = (*store.segments.values(), *getattr(store, "inner", store).segments.values())
    streamed = any(isinstance(segment, Streamed) for segment in held)
    if any(pages):  # a few operations for each of them
        assert pages == [0, 2, 5]
        assert (work[2] - work[0]) / pages[2] <= 1.1 * (work[1] - work[0]) / pages[1]
    elif streamed:  # the same for its blocks, which grow with what is kept
        assert work[2] - work[1] <= 1.1 * (work[1] - work[0]) * (LOOKS[2] - LOOKS[1]) / (LOOKS[1] - LOOKS[0])
    else:
        assert work[0] == work[1] == work[2]
    if case not in ROUNDED:
        want = read(model, LongCtxCache(model), ids)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-3)
        assert (out - read(model, LongCtxCache(model), ids[:, :-1])).abs().max() > 0.1
