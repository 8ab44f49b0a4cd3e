"""``store: quantized``: attention over what it keeps equals the rule, however the tokens came; its bytes and errors."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from helpers.device_reads import CountReads
from helpers.memory import Allocations
from helpers.one_layer import SCALE, OneLayer
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import ConfigError, LongCtxCache, LongCtxConfig, UnsupportedModelError, patch_model, report
from hf_longctx.kernels import _quantized, reference
from hf_longctx.kernels._quantized import PREFILL_NOTE, Quantised, quantise
from hf_longctx.layout.scores import Scores
from hf_longctx.model.layer_call import LayerCall
from hf_longctx.stores.base import SLACK, Reserve, room, spare
from hf_longctx.stores.quantized import Quantized

KV_HEADS, GROUP, DIM = 4, 2, 8
STREAMING = {"store": "sink_recent", "sink": 2, "recent": 9}


def patched(dtype=torch.float64, layers=1, roles="retrieval", dim=DIM, kernel="auto", **fields):
    """A tiny model whose retrieval heads quantise."""
    model = tiny_model("llama", dtype, layers=layers, kv_heads=KV_HEADS, group=GROUP, head_dim=dim)
    stores = {
        "retrieval": {"store": "quantized", **fields},
        "streaming": STREAMING,
    }
    return patch_model(model, config_for(model, roles, stores=stores, kernel=kernel))


def rounded(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """``x`` on ``2 ** bits`` levels between the least and the largest number along ``dim``, from the formula alone."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (most - least) / (2**bits - 1)
    return torch.where(step > 0, least + ((x - least) / step).round() * step, x)


def as_kept(k, v, tokens: int, spec: Quantized, group: int | None = None):
    """k, v ``[n, S, D]`` of a row, the first ``tokens`` of them as if packed; ``group`` None: the spec's own."""
    groups = k[:, :tokens].unflatten(1, (-1, group or spec.group))
    k = torch.cat([rounded(groups, 2, spec.bits).flatten(1, 2), k[:, tokens:]], 1)
    return k, torch.cat([rounded(v[:, :tokens], 2, spec.bits), v[:, tokens:]], 1)


class Driver(OneLayer):
    """A layer that quantises."""

    def __init__(self, starts=(0,), max_tokens=None, dim=DIM, dtype=torch.float64, **fields):
        super().__init__(patched(dtype, dim=dim, **fields), starts, max_tokens)

    def read_as(self, row, start, **other):
        """Tokens of earlier forwards as if packed, those that are old enough; ``other``: as `as_kept`."""
        packed = max(0, self.rows.past - start - self.spec.residual) // self.spec.group * self.spec.group
        return as_kept(*super().read_as(row, start), packed, self.spec, **other)


@pytest.mark.parametrize("starts", [(0,), (0, 0, 0), (0, 37, 150), (3, 160)])
@pytest.mark.parametrize(("bits", "group", "residual"), [(8, 16, 0), (4, 16, 20), (8, 32, 7), (4, 64, 128)])
def test_attention_equals_the_rule(starts, bits, group, residual, monkeypatch):
    monkeypatch.setattr(_quantized, "BLOCK", 4 * KV_HEADS * DIM * 32)  # several blocks
    run = Driver(starts, bits=bits, group=group, residual=residual)
    for count in (150, 1, 1, 70, 2, 1, 33, 1, 1, 300, 1, 1, 5, *[1] * 20):
        run.check(count)
    assert any(isinstance(segment, Quantised) for segment in run.cache.layers[0].stores[0].segments.values())


@pytest.mark.quick
def test_what_is_not_the_rule_is_seen():
    run = Driver((0, 37), bits=4, group=32, residual=7)
    run.check(200)
    out = run.step(1)
    assert (out - run.expected()).abs().max() <= 1e-12
    assert (out - run.expected(group=16)).abs().max() > 1e-4
    exact = reference.attention(run.q, run.k, run.v, None, SCALE)[0]
    assert (out - exact)[0].abs().max() > 1e-4
    assert run.forward.log.used == {"cpu", "streamed"}


@pytest.mark.parametrize("starts", [(0,), (0, 37, 150)])
@pytest.mark.parametrize(("bits", "group"), [(8, 48), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_kernel_reads_what_the_store_kept(starts, bits, group, dtype):
    outs, fields = {}, {"bits": bits, "group": group, "residual": 20, "dim": 32, "dtype": dtype}
    for kernel, used in (("native", {"native"}), ("cpu", {"cpu", "streamed"})):
        torch.manual_seed(1)
        run = Driver(starts, kernel=kernel, **fields)
        run.step(700)
        outs[kernel] = torch.cat([run.step(1) for _ in range(70)], 2).double()
        assert run.forward.log.used == used
        assert outs[kernel].isfinite().all()
    error = (outs["native"] - outs["cpu"]).abs().max()
    # In float32 the scores, some hundreds here, are rounded by 3e-5 each; test_native_packed.py holds it to the truth.
    assert error <= max(8 * torch.finfo(dtype).eps, 3e-5) * outs["cpu"].abs().max()
    assert (outs["native"] - outs["cpu"].roll(1, 2)).abs().max() > 0.1


def test_a_prompt_read_at_once_is_read_exactly():
    run = Driver((0,), bits=4, group=16, residual=0)
    out = run.step(500)
    want = reference.attention(run.q, run.k, run.v, reference.causal_visible(500, 500), SCALE)[0]
    assert (out - want).abs().max() <= 1e-12 and run.forward.log.used == {"cpu"}


@pytest.mark.parametrize("starts", [(0,), (0, 37, 150)])
@pytest.mark.parametrize("seed", range(3))
def test_random_steps_and_rollbacks_within_the_slack(starts, seed):
    rng = random.Random(seed)
    run = Driver(starts, bits=4, group=32, residual=10)
    run.check(400)
    furthest, backs = 400, 0
    for _ in range(60):
        if rng.random() < 0.4:
            back = rng.randint(1, SLACK)
            if run.seen - back >= max(furthest - SLACK, 200):
                run.cache.crop(-back)
                run.k, run.v = run.k[:, :, :-back], run.v[:, :, :-back]
                backs += 1
        run.check(rng.choice([1, 1, 1, 2, 31, 100]))
        furthest = max(furthest, run.seen)
    assert backs > 3


@pytest.mark.parametrize("starts", [(0,), (0, 37, 150)])
@pytest.mark.parametrize("target", [160, 300, 301, 500])
def test_a_deeper_rollback_reads_what_was_rounded(starts, target):
    run = Driver(starts, bits=4, group=32, residual=40)
    run.check(1000)
    run.cache.crop(target)
    exact, k, v = (run.k[:, :, :target], run.v[:, :, :target]), [], []
    # What the exact buffer no longer held had been rounded, each group of it by itself, and stays as it was.
    base = min(start + max(0, 1000 - SLACK - start - 40) // 32 * 32 for start in starts)
    for row, start in enumerate(starts):
        a, b = (x[row, :, start:target] for x in exact)
        gone = min(target, base) - start
        whole = -(-gone // 32) * 32
        c, d = as_kept(run.k[row, :, start : start + whole], run.v[row, :, start : start + whole], whole, run.spec)
        pads = torch.zeros(KV_HEADS, start, DIM, dtype=torch.float64)
        k.append(torch.cat([pads, c[:, :gone], a[:, gone:]], 1))
        v.append(torch.cat([pads, d[:, :gone], b[:, gone:]], 1))
    run.k, run.v = torch.stack(k), torch.stack(v)
    assert (run.k - exact[0]).abs().max() > 1e-3
    for count in (1, 1, 1):
        out = run.step(count)
        assert (out - expected_after(run, 40, 32, target)).abs().max() <= 1e-12
    run.cache.crop(1)
    run.k, run.v = run.k[:, :, :1], run.v[:, :, :1]
    if starts == (0,):
        run.check(1)


def expected_after(run, residual, group, target):
    """Attention over ``run.k`` and ``run.v``, in which what is packed is rounded already, but for the newest groups."""
    outs = []
    for row, start in enumerate(run.starts):
        k, v = run.k[row, :, start:].clone(), run.v[row, :, start:].clone()
        done = max(0, target - start - residual) // group * group
        due = max(0, run.rows.past - start - residual) // group * group
        if due > done:
            more = as_kept(k[:, done:due], v[:, done:due], due - done, run.spec)
            k[:, done:due], v[:, done:due] = more
        outs.append(reference.attention(run.q[row : row + 1], k[None], v[None], None, SCALE)[0])
    return torch.cat(outs)


@pytest.mark.parametrize("max_tokens", [None, 700])
def test_beams_copies_and_pickles(max_tokens):
    run = Driver((0, 37, 150), max_tokens, bits=4, group=16, residual=20)
    run.check(300)
    cache, k, v, starts = run.cache, run.k, run.v, run.starts

    def with_rows(cache, picked):
        run.cache, run.k, run.v = cache, k[picked], v[picked]
        run.starts = tuple(starts[row] for row in picked)
        for count in (1, 40, 1):
            run.check(count)

    order = [2, 0, 0]
    beams = copy.deepcopy(cache)
    beams.reorder_cache(torch.tensor(order))
    with_rows(beams, order)
    doubled = pickle.loads(pickle.dumps(cache))
    assert doubled.nbytes == cache.nbytes
    doubled.batch_repeat_interleave(2)
    with_rows(doubled, [0, 0, 1, 1, 2, 2])
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    with_rows(chosen, [1])
    with_rows(cache, [0, 1, 2])


@pytest.mark.parametrize("starts", [(0,), (0, 37, 150)])
def test_forks_share_what_is_packed_and_go_their_own_ways(starts):
    run = Driver(starts, bits=8, group=16, residual=20)
    run.check(700)
    one, k, v = run.cache, run.k, run.v
    other = one.fork()
    assert sum(x.untyped_storage().nbytes() for x in shared(other)) > 0
    assert {x.data_ptr() for x in shared(other)} == {x.data_ptr() for x in shared(one)}
    many = other.fork()
    if len(starts) == 1:
        before = many.nbytes
        many.batch_repeat_interleave(3)
        assert many.nbytes < 2.5 * before
        assert {x.data_ptr() for x in shared(many)} == {x.data_ptr() for x in shared(one)}
    for turn in range(2):
        for cache, counts in ((one, (1, 90, 1)), (other, (40, 1, 1)), (many, (1, 1, 60))):
            times = cache.batch_size // len(starts)
            run.cache, run.starts = cache, starts * times
            run.k, run.v = (x.repeat_interleave(times, 0) for x in (k, v))
            cache.crop(700 if turn else 1000)
            for count in counts:
                run.check(count)


def shared(cache):
    pieces = (piece for piece in cache.layers[0].stores[0].pieces if piece.shared)
    return [x for piece in pieces for x in piece.tensors()]


def test_a_fork_can_go_back_into_what_it_shares():
    run = Driver((0, 37), bits=8, group=16, residual=20)
    run.check(700)
    whole, k, v = run.cache, run.k, run.v
    other = whole.fork().fork()
    other.crop(300)
    assert max(piece.end for piece in other.layers[0].stores[0].pieces) == (300 - 20) // 16 * 16
    run.cache, run.k, run.v = other, k[:, :, :300], v[:, :, :300]
    for count in (50, 1, 200, 1):
        run.step(count)
    run.cache, run.k, run.v = whole, k, v
    for count in (1, 100, 1):
        run.check(count)


def test_reset_and_a_first_chunk_of_pads():
    run = Driver((0, 60), bits=8, group=16, residual=5)
    for count in (30, 50, 100, 1):
        run.check(count)
    run.cache.reset()
    assert run.cache.nbytes == 0 and run.cache.layers[0].stores[0].base == 0
    run.k, run.v = run.k[:, :, :0], run.v[:, :, :0]
    run.starts = (80, 80)
    for count in (1, 30, 50, 100, 1):
        run.check(count)


def test_what_was_filled_in_inference_mode_or_another_dtype_goes_on():
    run = Driver(bits=8, group=16, residual=20)
    with torch.inference_mode():
        run.check(300)
    run.k, run.v = run.k.clone(), run.v.clone()
    for count in (1, 300, 1):
        run.check(count)
    for count in (300, 1, 300):
        with torch.autocast("cpu"):
            kept = run.cache.update(*torch.randn(2, 1, KV_HEADS, count, DIM), 0)[0]
        q = torch.randn(1, KV_HEADS * GROUP, count, DIM)
        assert {one.dtype for part in kept.parts for one in part.segments} == {torch.float64}
        assert LayerCall(run.plan, kept.forward, Scores(SCALE)).cached(q, kept.parts).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_device_reads_of_a_decode_step_do_not_grow_with_the_layers(padded, dtype):
    counts = []
    for layers in (2, 6):
        model = patched(dtype, layers=layers, dim=16, group=16, residual=0)
        cache, (ids, mask) = LongCtxCache(model), left_padded([60, 9] if padded else [60, 60])
        with torch.no_grad(), CountReads() as count:
            for low, high in ((0, 50), (50, 59), (59, 60)):
                count.reads = 0
                model(ids[:, low:high], attention_mask=mask[:, :high], past_key_values=cache)
        counts.append(count.reads)
    assert counts[0] == counts[1]


# Numbers.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_read_is_at_most_half_a_step_away(dtype, bits):
    x = torch.randn(6, 40, 64, dtype=torch.float64)
    x[0] *= 1e-7
    x[1] *= 1e4
    x[2] += 300
    x[3, :, :7] = 3.25  # constant channels
    x[4, 5] *= 1e4  # a token that stands out
    x[5, :, 9], x[5, :3, 10] = -0.0, 0.0
    x = x.to(dtype)
    for dim in (1, 2):
        codes, (step, least) = quantise(x, dim, bits)
        assert codes.dtype == torch.uint8 and codes.shape == (6, 40, 64 * bits // 8) and step.dtype == dtype
        numbers = codes if bits == 8 else torch.cat([codes & 15, codes >> 4], 2)
        got = least.double() + numbers.double() * step.double()
        wide = {torch.float64: 2**-52}.get(dtype, 2**-23)
        bound = 0.5 * step.double() + 4 * wide * x.double().abs().amax(dim, keepdim=True)
        error = (got - x.double()).abs()
        assert (error <= bound).all()
        assert (error > 0.9 * bound).any(), "the bound is not an idle one"
        assert torch.equal(least, x.amin(dim, keepdim=True))
        spread = (x.amax(dim, keepdim=True).double() - least.double()) / (2**bits - 1)
        assert (step.double() >= spread * (1 - 1e-15)).all()
        usual = spread > 1e-3
        assert (step.double()[usual] <= spread[usual] * (1 + 2 * torch.finfo(dtype).eps)).all()
    constant = quantise(x, 1, bits)
    assert (constant[1][0][3, :, :7] == 0).all() and (constant[0][3, :, : min(7, 32)] & 15 == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reads_as_nan(bad, dtype):
    k, v = torch.randn(2, 1, 2, 32, 16).to(dtype)
    k[0, 1, 20, 3] = v[0, 0, 7, 5] = bad
    packed = Quantised.empty(k, v, 2, 32, 8, 16, 0)
    packed.write(slice(None), 0, k, v)
    got_k, got_v = packed.unpack(0, 32)
    want_k, want_v = torch.zeros_like(k, dtype=torch.bool), torch.zeros_like(k, dtype=torch.bool)
    want_k[0, 1, 16:, 3], want_v[0, 0, 7] = True, True
    assert torch.equal(got_k.isnan(), want_k) and torch.equal(got_v.isnan(), want_v)


def test_a_range_beyond_the_dtype_reads_as_nan_and_wide_ones_do_not():
    for dtype, largest in ((torch.float16, 65504.0), (torch.float32, 1.6e38), (torch.bfloat16, 1.6e38)):
        x = torch.tensor([-largest, 0.0, largest], dtype=dtype)[None]
        codes, (step, least) = quantise(x, 1, 8)
        got = least.double() + codes * step.double()
        assert ((got - x.double()).abs() <= 0.5 * step.double() * (1 + 1e-6)).all()
    x = torch.tensor([[-3e38, 3e38]])
    assert quantise(x, 1, 8)[1][0].isnan().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_unpack_a_bounded_number_of_tokens_into_the_same_memory(bits, monkeypatch):
    k, v = torch.randn(2, 2, 3, 1024, 16, dtype=torch.float64)
    packed = Quantised.empty(k, v, 3, 1024, bits, 32, 0)
    packed.write(slice(None), 0, k, v)
    monkeypatch.setattr(_quantized, "BLOCK", 2 * 3 * 16 * 100)
    reader = packed.seen([1024, 512], lambda values, device: torch.tensor(values))
    at, places = 0, set()
    want = packed.unpack(0, 1024)
    with Allocations() as made:
        for block in reader.blocks():
            places.add(block.k.data_ptr())
            width = block.k.shape[2]
            assert width <= 96 and block.k.dtype == torch.float64
            assert torch.equal(block.k, want[0][:, :, at : at + width])
            assert torch.equal(block.v, want[1][:, :, at : at + width])
            lengths = [block.length] * 2 if isinstance(block.length, int) else block.length.tolist()
            assert lengths == [width, min(max(0, 512 - at), width)]
            at += width
    assert at == 1024 and len(places) == 1
    assert made.largest <= 2 * 3 * 16 * 100
    kept = reader.seen([1024], None).contents()
    assert torch.equal(kept[0], want[0]) and reader.joined_note == PREFILL_NOTE


# Memory.


def allocated(store):
    return sum(x.numel() * x.element_size() for x in store.tensors())


@pytest.mark.parametrize("max_tokens", [None, 3000])
@pytest.mark.parametrize("fields", [{}, {"bits": 4}, {"bits": 4, "group": 16, "residual": 0}, {"group": 512}])
def test_bytes_are_calculated_and_already_there_at_prefill(fields, max_tokens):
    for tokens in (1, 100, 383, 384, 385, 511, 512, 513, 1000, 2959):
        run = Driver(max_tokens=max_tokens, dtype=torch.float32, dim=16, **fields)
        store = run.cache.layers[0].stores[0]
        run.step(tokens)
        wanted = KV_HEADS * run.spec.nbytes(tokens, 16, 4, Reserve(max_tokens)).device
        assert allocated(store) == run.cache.nbytes == wanted
        for _ in range(40 if max_tokens else spare(min(tokens, run.spec.window()))):
            run.step(1)
        assert run.cache.nbytes == wanted, "decoding must not copy the cache at once"
        exact, packed = (store.segments[name] for name in ("exact", "packed")) if tokens > 1000 else (None, None)
        if exact is not None:
            assert exact.k.shape[2] <= run.spec.window() == run.spec.residual + 2 * run.spec.group + 256
            assert packed.slots <= room(tokens, max_tokens)


@pytest.mark.quick
def test_bytes_are_codes_scales_and_the_newest_tokens():
    tokens, dim = 32768, 128
    packed = (tokens - 128) // 64 * 64
    for bits in (8, 4):
        spec = Quantized(bits=bits)
        codes = 2 * packed * dim * bits // 8
        scales = 2 * 2 * (packed // 64 * dim + packed)
        assert spec.nbytes(tokens, dim, 2).device == codes + scales + 2 * (tokens - packed) * dim * 2
        share = spec.nbytes(tokens, dim, 2).device / (2 * tokens * dim * 2)
        assert share == pytest.approx({8: 0.526, 4: 0.277}[bits], abs=2e-3)
    assert Quantized().nbytes(100, dim, 2).device == 2 * 100 * dim * 2


def test_max_tokens_never_allocates_the_cache_again():
    run = Driver(max_tokens=1500, bits=4, group=16, residual=10)
    run.check(390)
    held = [x.data_ptr() for x in run.cache.layers[0].tensors()]
    for _ in range(1100):
        run.step(1)
    run.check(1)
    assert [x.data_ptr() for x in run.cache.layers[0].tensors()] == held


def test_many_decoded_tokens_copy_what_is_packed_seldom():
    run = Driver(bits=8, group=16, residual=10)
    run.step(600)
    places = []
    for _ in range(600):
        run.step(1)
        places.append(run.cache.layers[0].stores[0].segments["packed"].k.data_ptr())
    assert sum(a != b for a, b in zip(places[:-1], places[1:], strict=True)) == 5, "an eighth at a time"


def test_a_rollback_gives_memory_back():
    run = Driver(bits=8, group=16, residual=10)
    run.step(5000)
    run.cache.crop(900)
    run.k, run.v = run.k[:, :, :900], run.v[:, :, :900]
    run.step(1)
    assert run.cache.nbytes == KV_HEADS * run.spec.nbytes(901, DIM, 8, Reserve()).device


# Models.


def test_a_model_generates_and_reports_what_ran():
    model = patched(torch.float32, layers=2, roles="mixed", group=16, residual=8)
    ids, mask = left_padded([120, 70])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, num_beams=2)
    assert out.shape == (2, 150)
    for row, length in enumerate((120, 70)):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=30, do_sample=False, num_beams=2)
        assert torch.equal(alone[0, length:], out[row, 120:])
    assert "streamed" in str(report(model))


def test_training_and_other_caches_read_exactly():
    model = patched(torch.float64, layers=2, roles="mixed", bits=4, group=16, residual=0)
    ids = torch.randint(3, 97, (2, 90))
    quantised = model(ids).logits
    plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(quantised, plain, rtol=0, atol=1e-6)
    plain.sum().backward()
    stores = {"retrieval": {"store": "full"}, "streaming": STREAMING}
    full = patch_model(model, config_for(model, "mixed", stores=stores))
    torch.testing.assert_close(full(ids, use_cache=False).logits, plain, rtol=0, atol=1e-6)


def test_a_pattern_over_a_continued_prompt_unpacks_a_layer_and_says_so():
    model = tiny_model("llama", torch.float64, layers=1)
    stores = {"retrieval": {"store": "quantized", "group": 16, "residual": 0}}
    prefill = {"min_tokens": 1, "retrieval": {"pattern": "block_topk", "top_k": 100}}
    patch_model(model, config_for(model, "retrieval", stores=stores, prefill=prefill))
    ids, cache = torch.randint(3, 97, (1, 600)), LongCtxCache(model)
    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache)
        assert PREFILL_NOTE not in report(model).notes
        sparse = model(ids[:, 300:], past_key_values=cache).logits
        assert PREFILL_NOTE in report(model).notes
        patch_model(model, config_for(model, "retrieval", stores=stores))
        cache = LongCtxCache(model)
        model(ids[:, :300], past_key_values=cache)
        dense = model(ids[:, 300:], past_key_values=cache).logits
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-6)


def test_half_the_heads_of_a_sliding_model_quantise():
    model = tiny_model("qwen2", torch.float64, layers=2, sliding=20)
    stores = {"retrieval": {"store": "quantized", "group": 16, "residual": 0}}
    patch_model(model, config_for(model, "retrieval", stores=stores))
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 200)), past_key_values=cache)
    kinds = [type(layer.stores[0].spec).__name__ for layer in cache.layers]
    assert kinds == ["Quantized", "SinkRecent"]


@pytest.mark.quick
def test_what_it_does_not_take():
    with pytest.raises(ConfigError, match="stores.retrieval.group: got 40, expected a multiple of 16"):
        patched(group=40)
    with pytest.raises(ConfigError, match="stores.retrieval.bits: got 5, expected a whole number, one of 8, 4"):
        patched(bits=5)
    model = patched()
    data = LongCtxConfig.from_dict(model.config.longctx).to_dict()
    assert data["stores"]["retrieval"] == {"store": "quantized", "bits": 8, "group": 64, "residual": 128}
    with pytest.raises(ConfigError, match="'quantized' serves retrieval heads"):
        LongCtxConfig.from_dict({**data, "stores": {"streaming": {"store": "quantized"}}})
    odd = torch.randn(2, 1, KV_HEADS, 3, 7, dtype=torch.float64)
    Driver().cache.update(*odd, 0)
    with pytest.raises(UnsupportedModelError, match="even number"):
        Driver(bits=4).cache.update(*odd, 0)
