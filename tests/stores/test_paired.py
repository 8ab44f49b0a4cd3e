"""``store: paired``: two layers keep one direction of each key and value, and what each of them reads of it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from helpers.caches import read
from helpers.forgeries import Forger
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.kernels import base, reference
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import ALL, CAUSAL
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment
from hf_longctx.stores.paired import SINGLE, PairedStore, between

KV_HEADS, DIM, LAYERS = 2, 8, 4


def patched(dtype=torch.float64, layers=LAYERS, roles="retrieval", **fields):
    model = tiny_model("llama", dtype, layers=layers, kv_heads=KV_HEADS, group=2, head_dim=DIM)
    return patch_model(model, config_for(model, roles, stores={"retrieval": {"store": "paired", **fields}}))


def retrieval(cache):
    return [next((one for one in layer.stores if one.heads.role == "retrieval"), None) for layer in cache.own]


def end(cache):
    stores = retrieval(cache)
    next(one for one in stores if one).spec.across(stores, Rows(cache.batch_size, 0, cache.seen, cache.starts))


def filled(tokens=60, starts=None, alike=False, **fields):
    """A cache of keys and values that are given by hand, and these: layer -> (k, v)."""
    cache = LongCtxCache(patched(**fields), fields.pop("max_tokens", None))
    given = []
    for _ in range(LAYERS):
        k, v = torch.randn(2, 2 if starts is None else len(starts), KV_HEADS, tokens, DIM, dtype=torch.float64)
        given.append(given[0] if alike and given else (k, v))
    cache.starts = starts
    for layer, (k, v) in enumerate(given):
        cache.update(k, v, layer)
    return cache, given


def shown(cache, layer, row=0):
    """k, v ``[n, S, D]`` that a row's queries read in a layer."""
    start = (cache.starts or (0,) * cache.batch_size)[row]
    store = retrieval(cache)[layer]
    part = store.held(Rows(cache.batch_size, 0, cache.seen, cache.starts))
    pairs = [one.contents() for one in part.alone(slice(row, row + 1), start)]
    return [torch.cat(x, 2)[0] for x in zip(*pairs, strict=True)]


def merged(x, y, t, retain):
    """What the rule makes of a row's keys in both layers ``[n, S, D]``, token by token, head by head."""
    x, y = x.clone(), y.clone()
    count = math.ceil(x.shape[1] * retain - 1e-9)
    for head in range(x.shape[0]):
        a, b = x[head] / x[head].norm(dim=1, keepdim=True), y[head] / y[head].norm(dim=1, keepdim=True)
        angle = (a * b).sum(1).acos()
        far = set(angle.argsort(descending=True)[:count].tolist())
        for token in set(range(x.shape[1])) - far:
            w = angle[token]
            e = ((1 - t) * w).sin() / w.sin() * a[token] + (t * w).sin() / w.sin() * b[token]
            x[head, token], y[head, token] = e * x[head, token].norm(), e * y[head, token].norm()
    return x, y


@pytest.mark.parametrize("starts", [None, (0, 37, 55)])
@pytest.mark.parametrize(("t", "retain"), [(0.6, 0.05), (0.0, 0.0), (1.0, 0.3), (0.6, 1.0)])
@pytest.mark.parametrize("start", [None, 0, 1])
def test_two_layers_read_what_the_rule_says(starts, t, retain, start):
    cache, given = filled(starts=starts, t=t, retain=retain, start=start)
    end(cache)
    first = 2 if start is None else start
    lowers = range(first, LAYERS - 1, 2)
    for row in range(cache.batch_size):
        at = (starts or (0,) * cache.batch_size)[row]
        for part in (0, 1):
            want = [one[part][row, :, at:] for one in given]
            for low in lowers:
                want[low : low + 2] = merged(want[low], want[low + 1], t, retain)
            for layer in range(LAYERS):
                error = (shown(cache, layer, row)[part] - want[layer]).abs().max()
                assert error <= 1e-12, (row, layer, part, error)
                if t == 0.6 and want[layer].shape[1] > 10:
                    paired = any(layer in (low, low + 1) for low in lowers)
                    off = (want[layer] - given[layer][part][row, :, at:]).abs().max()
                    assert (off > 0.1) == (paired and retain < 1), "a control"


@pytest.mark.quick
def test_the_ends_of_the_arc_are_the_layers_own():
    for t, own in ((0.0, 0), (1.0, 1)):
        cache, given = filled(t=t, retain=0.0, start=0)
        end(cache)
        for layer in (0, 1):
            direction = shown(cache, layer)[0] / shown(cache, layer)[0].norm(dim=2, keepdim=True)
            want = given[own][0][0] / given[own][0][0].norm(dim=2, keepdim=True)
            torch.testing.assert_close(direction, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(shown(cache, layer)[0].norm(dim=2), given[layer][0][0].norm(dim=2))
        torch.testing.assert_close(shown(cache, own)[0], given[own][0][0], rtol=0, atol=1e-12)
        assert (shown(cache, 1 - own)[0] - given[1 - own][0][0]).abs().max() > 0.1, "a control"


def test_equal_layers_are_restored():
    cache, given = filled(alike=True, retain=0.0, start=0)
    end(cache)
    assert all(one.pieces for one in retrieval(cache))
    for layer in range(LAYERS):
        torch.testing.assert_close(shown(cache, layer)[0], given[0][0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_arcs_of_no_length_and_half_a_circle_are_finite(dtype):
    x = torch.randn(5, DIM, dtype=dtype)
    y = torch.stack([x[0], -x[1], 3 * x[2], x[3] * 0, -2 * x[4] * (1 + torch.finfo(dtype).eps)])
    made, angle = between(x, y, 0.6)
    assert made.isfinite().all()
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made, unit, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert angle.isinf().tolist() == [False, True, False, False, True]
    assert between(x * 0, x * 0, 0.6)[0].eq(0).all()


def test_opposite_directions_stay_exact():
    cache, given = filled(tokens=20, retain=0.0, start=0)
    cache.reset()
    k, v = given[0]
    for layer in range(LAYERS):
        turned = k.clone()
        turned[:, :, 3:5] *= (-1.0) ** layer
        cache.update(turned, v, layer)
    end(cache)
    assert torch.equal(shown(cache, 1)[0][:, 3:5], -k[0, :, 3:5])
    torch.testing.assert_close(shown(cache, 1)[0][:, 5:], k[0, :, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 60, 500])
def test_what_both_have_is_in_memory_once(tokens):
    cache, _ = filled(tokens, start=0)
    end(cache)
    lower, upper = retrieval(cache)[:2]
    item, batch = 8, 2
    exact = math.ceil(tokens * 0.05)
    once = batch * KV_HEADS * 2 * (tokens * DIM + exact) * item
    own = batch * KV_HEADS * 2 * (tokens + exact * DIM) * item
    room = batch * KV_HEADS * 2 * 16 * DIM * item
    assert sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in lower.tensors()}.values()) == (
        once + own + room
    )
    assert cache.nbytes == LAYERS // 2 * (once + 2 * own + 2 * room)
    if tokens == 500:
        assert cache.nbytes < 0.75 * LAYERS * batch * KV_HEADS * 2 * tokens * DIM * item
    assert lower.spec.nbytes(tokens, DIM, item).device == 2 * tokens * DIM * item, "said as of full"
    assert {x.data_ptr() for x in lower.tensors()} & {x.data_ptr() for x in upper.tensors()}


def test_forks_copies_and_rows_keep_pairs(tmp_path):
    cache, _ = filled(starts=(0, 37, 55), start=0)
    end(cache)
    want = [[shown(cache, layer, row) for row in range(3)] for layer in range(LAYERS)]

    def holds(other, picked, limit):
        for layer in range(LAYERS):
            for row, before in enumerate(picked):
                for got, one in zip(shown(other, layer, row), want[layer][before], strict=True):
                    assert torch.equal(got, one)
        assert other.nbytes <= limit

    size = cache.nbytes
    holds(copy.deepcopy(cache), [0, 1, 2], size)
    holds(pickle.loads(pickle.dumps(cache)), [0, 1, 2], size)
    fork = cache.fork()
    assert {x.data_ptr() for x in fork.tensors() if x.numel()} <= {x.data_ptr() for x in cache.tensors()}
    for other in (fork, cache.fork()):
        other.reorder_cache(torch.tensor([2, 0, 0]))
        holds(other, [2, 0, 0], 1.1 * size)
        other.batch_repeat_interleave(2)
        holds(other, [2, 2, 0, 0, 0, 0], 2.1 * size)
        other.batch_select_indices(torch.tensor([1]))
        holds(other, [2], 0.5 * size)
    holds(cache, [0, 1, 2], size)
    one, _ = filled(tokens=600, starts=(3,), start=0)
    end(one)
    size = one.nbytes
    one.batch_repeat_interleave(5)
    assert one.nbytes < 1.6 * size, "sequences of one prompt hold it once, but for their room"


def test_a_saved_cache_is_twice_its_directions_and_reads_the_same(tmp_path):
    model = patched(torch.float64, start=0)
    ids, mask = left_padded([90, 61])
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :70], mask[:, :70])
    end(cache)
    read(model, cache, ids[:, 70:80], mask[:, :80])
    cache = cache.fork()
    cache.save(tmp_path / "a")
    loaded = LongCtxCache.load(tmp_path / "a", model)
    assert cache.nbytes < loaded.nbytes
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for low, high in ((80, 81), (81, 90)):
        want = read(model, cache, ids[:, low:high], mask[:, :high])
        assert torch.equal(read(model, loaded, ids[:, low:high], mask[:, :high]), want)
    forger = Forger(tmp_path / "a")
    for name, change, said in (
        ("pair 0.k_at", lambda x: x + 90, "k_at are not"),
        ("pair 0.v_at", lambda x: x * 0, "v_at are not"),
        ("pair 0.k_at", lambda x: x[..., :1], "k_exact: it is"),
        ("pair 0.k_unit", lambda x: x[:, :, :9], "it is F64"),
        ("pair 0.v_norm", lambda x: x[:, :, :9], "v_norm: it is"),
    ):

        def edit(tensors, told, name=name, change=change):
            first = next(one for one in tensors if one.endswith(name))
            tensors[first] = change(tensors[first]).contiguous()

        with pytest.raises(CacheError, match=said):
            LongCtxCache.load(forger.write(tmp_path / "false", edit), model)


@pytest.mark.parametrize("lengths", [[90], [90, 61, 12]])
def test_a_conversation_reads_as_its_parts_were_restored(lengths):
    """Pads change nothing, and what comes after a prompt is exact until the next one ends."""
    model = tiny_model("llama", torch.float64, layers=LAYERS, kv_heads=KV_HEADS, group=2, head_dim=DIM)
    full = copy.deepcopy(model)
    for one, store in ((model, {"store": "paired", "start": 0}), (full, {"store": "full"})):
        patch_model(one, config_for(one, "retrieval", stores={"retrieval": store}))
    ids, mask = left_padded(lengths)
    cache, differs = LongCtxCache(model), LongCtxCache(full)
    alone = [LongCtxCache(model) for _ in lengths]
    for low, high in ((0, 40), (40, 80), (80, 81), (81, 83), (83, 84), (84, 90)):
        positions = (torch.arange(low, high) - 90 + torch.tensor(lengths)[:, None]).clamp(min=0)  # rounded alike
        given = {"attention_mask": mask[:, :high], "position_ids": positions}
        with torch.no_grad():
            got = model(ids[:, low:high], past_key_values=cache, **given).logits[:, -1]
        for row, own in enumerate(alone):
            at = 90 - lengths[row]
            if high > at:
                new = ids[row : row + 1, max(low, at) : high]
                torch.testing.assert_close(read(model, own, new)[0], got[row], rtol=0, atol=1e-9)
        with torch.no_grad():
            exact = full(ids[:, low:high], past_key_values=differs, **given).logits[:, -1]
        assert torch.allclose(got, exact, atol=1e-9) == (high <= 80)
        if high in (80, 83):
            for one in (cache, *(one for one in alone if one.seen)):
                end(one)
    assert cache.oldest_crop == 83
    cache.crop(83)
    with pytest.raises(CacheError, match="cannot crop from 83 to 82"):
        cache.crop(82)
    cache.reset()
    assert cache.nbytes == 0 and cache.oldest_crop == 0


def test_layers_with_other_heads_stay_full():
    model = patched(torch.float64, roles=["RR", "RS", "RS", "RS"], start=0)
    cache = LongCtxCache(model)
    ids = torch.randint(3, 97, (1, 60))
    read(model, cache, ids)
    end(cache)
    assert [bool(one.pieces) for one in retrieval(cache)] == [False, False, True, True]
    assert [one.note for one in retrieval(cache)] == [SINGLE, SINGLE, None, None]
    model = patched(torch.float64, roles=["RR", "SS", "RR", "RR"], start=0)
    cache = LongCtxCache(model)
    read(model, cache, ids)
    end(cache)
    stores = retrieval(cache)
    assert stores[1] is None and isinstance(stores[0], PairedStore) and stores[0].note and not stores[0].pieces
    assert stores[2].pieces and read(model, cache, ids[:, :1]).isfinite().all()


def test_a_selection_takes_what_is_restored():
    cache, _ = filled(start=0, retain=0.2)
    end(cache)
    (piece,) = retrieval(cache)[1].pieces.values()
    slots = torch.randint(0, 60, (2, KV_HEADS, 30))
    for got, whole in zip(piece.take(slots), piece.contents(), strict=True):
        assert torch.equal(got, whole.gather(2, slots[..., None].expand(-1, -1, -1, DIM)))
    later = piece.alone(slice(1, 2), 11)
    for got, whole in zip(later.contents(), piece.contents(), strict=True):
        assert torch.equal(got, whole[1:, :, 11:])
    slots = torch.randint(0, 49, (1, KV_HEADS, 30))
    for got, whole in zip(later.take(slots), piece.contents(), strict=True):
        assert torch.equal(got, whole[1:, :, 11:].gather(2, slots[..., None].expand(-1, -1, -1, DIM)))


@pytest.mark.parametrize("new", [1, 24, 25])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("retain", [0.0, 0.2, 1.0])
def test_few_queries_and_many_read_the_same(new, softcap, pads, retain, monkeypatch):
    monkeypatch.setattr("hf_longctx.kernels._merged.TILE", 16)
    monkeypatch.setattr("hf_longctx.kernels._merged.TEMPORARY", 2 * KV_HEADS * 60 * 7)
    cache, _ = filled(start=0, retain=retain)
    end(cache)
    (piece,) = retrieval(cache)[1].pieces.values()
    piece = piece.alone(slice(None), 11)
    whole = Segment(*piece.contents(), 49)
    if pads:
        piece.hidden = whole.bias = torch.zeros(2, 1, 1, 49).double()
        piece.hidden[1, ..., :30] = float("-inf")
    q = torch.randn(2, 2 * KV_HEADS, new, DIM).double()
    own = Segment(*torch.randn(2, 2, KV_HEADS, new + 3, DIM).double(), new + 3)
    scores, reads, forward = Scores(0.3, softcap), CAUSAL if new > 1 else ALL, Forward(Rows(2, 52, new))
    out, lse = base.attend("auto", q, [piece, own], reads, scores, forward, want_lse=True)
    want, known = reference.attend(q, [whole, own], reads, scores)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, known, rtol=0, atol=1e-12)
    roll = reference.attend(q, [Segment(whole.k.roll(1, 2), whole.v, 49, whole.bias), own], reads, scores)[0]
    assert (out - roll).abs().max() > 1e-3, "a control"
