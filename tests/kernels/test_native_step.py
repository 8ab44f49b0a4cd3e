"""A decoded token that the native kernel writes and reads in one call: what the ordinary way gives, bit by bit.

The ordinary way, where stores append and every role attends by itself, is held to the reference elsewhere.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.ragged_cases import ragged, same, truth
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, UnsupportedModeError, patch_model, report
from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.layer_kv import Pending
from hf_longctx.cache.seam import CACHE
from hf_longctx.kernels import native
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.reads import ALL
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import HeadKV, Place, Segment
from hf_longctx.stores.full import FullStore
from hf_longctx.stores.sink_recent import SinkRecentStore
from hf_longctx.stores.sink_recent_compensated import SinkRecentCompensatedStore

DTYPES = [torch.float32, torch.bfloat16]
ROLES = [["RSRS", "SSRR", "RRRR"], ["SRSS", "SSSS", "RSSR"]]


pytestmark = pytest.mark.usefixtures("native_on")


@pytest.fixture
def taken(monkeypatch):
    """One entry per token and layer: whether it was taken in one step."""
    steps, real = [], LongCtxLayer.take_step

    def counted(self, *arguments):
        kv = real(self, *arguments)
        steps.append(kv is not None)
        return kv

    monkeypatch.setattr(LongCtxLayer, "take_step", counted)
    return steps


@pytest.fixture
def ordinary(monkeypatch):
    """Calling it turns steps off."""
    return lambda: monkeypatch.setattr(LongCtxLayer, "take_step", lambda *arguments: None)


def patched_model(dtype=torch.float32, roles=ROLES[0], **more):
    model = tiny_model(head_dim=16, dtype=dtype)
    patch_model(model, config_for(model, roles, sink=4, recent=9, **more))
    return model


def logits(model, cache, ids):
    with torch.no_grad():
        return model(ids, **{CACHE: cache}).logits


def decoded(model, cache, ids):
    """Logits of the tokens, read one at a time."""
    return torch.cat([logits(model, cache, ids[:, i : i + 1]) for i in range(ids.shape[1])], 1)


@pytest.mark.spanning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("roles", ROLES, ids=str)
@pytest.mark.parametrize("prompt", [1, 3, 13, 14, 40])
def test_every_token_is_that_of_the_ordinary_way(dtype, batch, roles, prompt, taken, ordinary):
    model, ids = patched_model(dtype, roles), torch.randint(3, 97, (batch, prompt + 30))
    runs = []
    for _ in range(2):
        cache = LongCtxCache(model)
        logits(model, cache, ids[:, :prompt])
        runs.append((decoded(model, cache, ids[:, prompt:]), cache))
        assert not taken or taken.count(True) > 60, "buffers grow in a few of the 90 steps, which go the ordinary way"
        taken.clear()
        ordinary()
    (got, one), (want, other) = runs
    assert torch.equal(got, want)
    assert got.std() > 0.1
    assert one.nbytes == other.nbytes
    for here, there in zip(one.own, other.own, strict=True):
        assert (here.seen, here.whole) == (there.seen, there.whole)
        for mine, theirs in zip(here.stores, there.stores, strict=True):
            pairs = zip(mine.segments["kept"].contents(), theirs.segments["kept"].contents(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert report(model).kernels == ("native",)


@pytest.mark.parametrize("back", [1, 5, 20])
def test_what_rings_dropped_is_remembered(back, taken, ordinary):
    model, ids = patched_model(), torch.randint(3, 97, (2, 100))
    cache = LongCtxCache(model)
    logits(model, cache, ids[:, :40])
    decoded(model, cache, ids[:, 40:80])
    cache.crop(80 - back)
    got = decoded(model, cache, ids[:, 80 - back :])
    assert taken.count(True) > 100
    ordinary()
    cache = LongCtxCache(model)
    logits(model, cache, ids[:, :40])
    assert torch.equal(got, decoded(model, cache, ids[:, 40:])[:, 40 - back :])


def change_rows(cache):
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    return cache


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), LongCtxCache.fork, change_rows],
    ids=["deepcopy", "pickle", "fork", "other rows"],
)
def test_a_cache_that_was_changed_goes_on(change, taken):
    model, ids = patched_model(), torch.randint(3, 97, (3, 60))
    runs = []
    for changed in (True, False):
        cache = LongCtxCache(model)
        logits(model, cache, ids[:, :40])
        decoded(model, cache, ids[:, 40:45])
        other = change(cache) if changed else cache
        rows = [1, 0, 1] if changed and change is change_rows else [0, 1, 2]
        runs.append(decoded(model, other, ids[rows][:, 45:]))
        if other is not cache:
            assert torch.equal(decoded(model, cache, ids[:, 45:]), runs[0]), "neither writes into the other"
    want = runs[1][[1, 0, 1]] if change is change_rows else runs[1]
    # what a fork shares is a segment of its own, and sums are joined segment by segment; linears round row by row
    assert torch.equal(runs[0], want) or change in (LongCtxCache.fork, change_rows)
    assert (runs[0] - want).abs().max() < 1e-4
    assert any(taken)


def test_the_threads_and_the_reserved_room_do_not_matter(taken):
    model, ids = patched_model(), torch.randint(3, 97, (1, 900))
    answers = []
    for threads, room in ((1, None), (2, 900)):
        torch.set_num_threads(threads)
        try:
            cache = LongCtxCache(model, max_tokens=room)
            logits(model, cache, ids[:, :880])
            answers.append(decoded(model, cache, ids[:, 880:]))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*answers)
    assert taken.count(False) <= 3


@pytest.mark.parametrize(
    "why, more",
    [
        ("pads", {}),
        ("gradients", {}),
        ("quantised", {"stores": {"retrieval": {"store": "quantized", "bits": 8}}}),
        ("stock", {"kernel": "stock"}),
        ("cpu", {"kernel": "cpu"}),
    ],
)
def test_what_is_no_single_place_goes_the_ordinary_way(why, more, taken):
    model = patched_model(**more)
    ids, mask = left_padded([20, 11 if why == "pads" else 20])
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE: cache})
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    with torch.set_grad_enabled(why == "gradients"):
        model(ids[:, :1], attention_mask=mask, **{CACHE: cache})
    assert not any(taken)


def test_a_store_with_an_append_of_its_own_has_no_place_by_inheritance():
    class Own(FullStore):
        def append(self, k, v, rows):
            return super().append(2 * k, v, rows)

    class Both(Own):
        def place(self, rows):
            return None

    assert [store.has_place() for store in (FullStore, SinkRecentStore, Both)] == [True] * 3
    assert not Own.has_place()
    assert not SinkRecentCompensatedStore.has_place()


def test_a_cropped_cache_gives_its_memory_back(taken):
    model, ids = patched_model(roles=["RRRR"] * 3), torch.randint(3, 97, (1, 900))
    cache = LongCtxCache(model)
    logits(model, cache, ids)
    most = cache.nbytes
    cache.crop(20)
    decoded(model, cache, ids[:, 20:22])
    assert cache.nbytes < most / 10
    assert taken[-6:] == [False] * 3 + [True] * 3


def test_a_cache_on_another_device_is_refused_before_a_layer_writes():
    model, ids = patched_model(), torch.randint(3, 97, (1, 24))
    cache = LongCtxCache(model)
    logits(model, cache, ids[:, :20])
    decoded(model, cache, ids[:, 20:22])
    elsewhere = torch.empty(1, 4, 1, 16, device="meta")
    forward = Forward(Rows(1, 22, 1), cached=True, steps=True)
    assert cache.own[0].take_step(elsewhere, elsewhere, forward) is None
    cache.begin(forward)
    with pytest.raises(CacheError, match="on meta, but this cache holds"):
        cache.update(elsewhere, elsewhere, 0)
    assert cache.own[0].whole


def test_an_interrupted_token_is_seen_by_the_next(monkeypatch):
    model, ids = patched_model(), torch.randint(3, 97, (1, 24))
    cache = LongCtxCache(model)
    logits(model, cache, ids[:, :20])
    decoded(model, cache, ids[:, 20:22])

    def fails(self, *arguments):
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(native.Step, "run", fails)
        with pytest.raises(MemoryError):
            logits(model, cache, ids[:, 22:23])
    with pytest.raises(CacheError, match="interrupted"):
        logits(model, cache, ids[:, 23:24])


def test_a_token_that_the_attention_refused_can_be_taken_back(taken):
    model, ids = patched_model(), torch.randint(3, 97, (1, 40))
    want, cache = LongCtxCache(model), LongCtxCache(model)
    for one in (want, cache):
        logits(model, one, ids[:, :30])
    model.config.attention_dropout = model.model.layers[1].self_attn.attention_dropout = 0.1
    model.model.layers[1].self_attn.train()
    with pytest.raises(UnsupportedModeError, match="asks for dropout"):
        logits(model, cache, ids[:, 30:31])
    model.eval()
    with pytest.raises(CacheError, match="interrupted"):
        logits(model, cache, ids[:, 30:31])
    cache.crop(30)
    assert torch.equal(decoded(model, cache, ids[:, 30:]), decoded(model, want, ids[:, 30:]))
    assert any(taken)


def step_call(dim=16):
    """What a step of a layer of two roles takes."""
    heads = [RoleHeads("retrieval", (1,), 3), RoleHeads("streaming", (0, 2), 3)]
    segments = [Segment(*(torch.randn(2, len(one.kv_heads), 20, dim) for _ in range(2)), 7) for one in heads]
    q, k, v = (torch.randn(2, n, 1, dim) for n in (6, 3, 3))
    return heads, [Place(segments[0], 6, 7), Place(segments[1], 2, 7)], q, k, v


def test_heads_read_what_their_role_keeps():
    heads, places, q, k, v = step_call()
    got = native.Step(heads).run(q, k, v, places, 0.3)
    for n, (place, at) in enumerate([(places[1], 0), (places[0], 0), (places[1], 1)]):
        keys, values = (x[:, at : at + 1, :7] for x in (place.segment.k, place.segment.v))
        assert torch.equal(keys[:, 0, place.slot], k[:, n, 0])
        assert torch.equal(values[:, 0, place.slot], v[:, n, 0])
        weights = (q[:, 2 * n : 2 * n + 2].double() @ keys.double().mT * 0.3).softmax(-1)
        assert (got[:, 0, 2 * n : 2 * n + 2].double() - (weights @ values.double())[:, :, 0]).abs().max() < 1e-6
    other = places[0]._replace(length=8)
    assert not torch.equal(native.Step(heads).run(q, k, v, [other, places[1]], 0.3), got), "a control"


@pytest.mark.parametrize("slot, length", [(-1, 7), (7, 7), (20, 21), (6, 21)])
def test_a_place_outside_of_its_segment_is_refused(slot, length):
    heads, places, q, k, v = step_call()
    before = [x.clone() for place in places for x in (place.segment.k, place.segment.v)]
    with pytest.raises(ValueError, match=f"slot {slot} and length {length} of a segment of 20 slots"):
        native.Step(heads).run(q, k, v, [places[0]._replace(slot=slot, length=length), places[1]], 0.3)
    after = [x for place in places for x in (place.segment.k, place.segment.v)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e31])
def test_scales_that_the_library_does_not_take_are_left_to_the_ordinary_way(scale):
    heads, places, q, k, v = step_call()
    assert native.Step(heads).run(q, k, v, places, scale) is None


@pytest.mark.parametrize("what", ["dtype", "queries", "head_dim", "batch"])
def test_tensors_that_do_not_fit_are_left_to_the_ordinary_way(what):
    heads, places, q, k, v = step_call()
    changed = {
        "dtype": (q.bfloat16(), k, v),
        "queries": (q.expand(-1, -1, 2, -1), k, v),
        "head_dim": (q[..., :8], k[..., :8], v[..., :8]),
        "batch": (q[:1], k[:1], v[:1]),
    }[what]
    assert native.Step(heads).run(*changed, places, 0.3) is None
    assert native.Step(heads).run(q, k, v, places, 0.3) is not None, "a control"


def before_call(dtype=torch.float32, dim=16):
    """`step_call` where the heads of the first role read what they kept of a prompt before their slots."""
    heads, places, q, k, v = step_call(dim)
    before = ragged([[600], [0]], dim, dtype, bias=True)
    segments = [replace(place.segment, k=place.segment.k.to(dtype), v=place.segment.v.to(dtype)) for place in places]
    places = [place._replace(segment=segment) for place, segment in zip(places, segments, strict=True)]
    return heads, [places[0]._replace(before=before), places[1]], q.to(dtype), k.to(dtype), v.to(dtype)


def ordinary_way(heads, places, q):
    """[B, 1, H, D] by a call per role; the new tokens are written."""
    out = torch.empty_like(q.transpose(1, 2))
    for one, place in zip(heads, places, strict=True):
        k, v = (x[:, :, : place.length] for x in (place.segment.k, place.segment.v))
        segments = [*([] if place.before is None else [place.before]), Segment(k, v, place.length)]
        own = one.take(q, 2)
        got = native.attend(own, segments, ALL, Scores(0.3))
        assert same(got, truth(own, segments, Scores(0.3)), 1e-5 if q.dtype == torch.float32 else 0.03)
        for nth, n in enumerate(one.kv_heads):
            out[:, 0, 2 * n : 2 * n + 2] = got[0][:, 2 * nth : 2 * nth + 2, 0]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_place_reads_before_its_slots(dtype):
    heads, places, q, k, v = before_call(dtype)
    step = native.Step(heads)
    got = step.run(q, k, v, places, 0.3)
    assert torch.equal(got, ordinary_way(heads, places, q))
    plain = step.run(q, k, v, [places[0]._replace(before=None), places[1]], 0.3)
    assert not torch.equal(got[0], plain[0]), "a control"
    assert torch.equal(got[1], plain[1]), "of this sequence nothing is left"
    assert torch.equal(plain, ordinary_way(heads, [places[0]._replace(before=None), places[1]], q))
    assert torch.equal(step.run(q, k, v, places, 0.3), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_notices_that_other_tokens_are_read_before(dtype):
    """A step lays out its call once; the slots, and all other tensors, stay where they are."""
    heads, places, q, k, v = before_call(dtype)
    step = native.Step(heads)
    first = step.run(q, k, v, places, 0.3)
    kept = places[0].before
    others = [
        ragged([[600], [31]], 16, dtype, bias=True),
        ragged([[600], [0]], 16, dtype, bias=False),
        replace(kept, score_bias=kept.score_bias * 2),
        replace(kept, k=kept.k.clone() * 2),
        replace(kept, v=kept.v.clone() * 2),
        replace(
            kept, starts=kept.starts + torch.tensor([[3], [0]]), lengths=kept.lengths - 3 * (kept.lengths > 0).long()
        ),
    ]
    for other in others:
        changed = [places[0]._replace(before=other), places[1]]
        got = step.run(q, k, v, changed, 0.3)
        assert not torch.equal(got, first)
        assert torch.equal(got, ordinary_way(heads, changed, q))
    places[0].before.map_rows(lambda x: x[[1, 0]])
    got = step.run(q, k, v, places, 0.3)
    assert not torch.equal(got[0], first[0]) and not torch.equal(got[1], first[1])
    assert torch.equal(got, ordinary_way(heads, places, q))


@pytest.mark.parametrize("changed", [
    {"starts": lambda x: x + 600}, {"lengths": lambda x: x - 1}, {"lengths": lambda x: x[:1]},
    {"starts": lambda x: x.int()}, {"v": lambda x: x[:-1]}, {"score_bias": lambda x: x[:-1]},
])  # fmt: skip
def test_what_is_read_before_must_fit_together(changed):
    """Also where the step went well before: then nothing is written either."""
    heads, places, q, k, v = before_call()
    step = native.Step(heads)
    first = step.run(q, k, v, places, 0.3)
    wrong = replace(places[0].before, **{name: how(getattr(places[0].before, name)) for name, how in changed.items()})
    kept = places[0].segment.k.clone()
    with pytest.raises(ValueError, match="a decoded token was given"):
        step.run(q, k + 1, v, [places[0]._replace(before=wrong), places[1]], 0.3)
    assert torch.equal(places[0].segment.k, kept)
    assert torch.equal(step.run(q, k, v, places, 0.3), first)


def test_parts_are_looked_at_with_every_token():
    """Also where they changed in place, of which the step is not told."""
    heads, places, q, k, v = before_call()
    step = native.Step(heads)
    step.run(q, k, v, places, 0.3)
    places[0].before.lengths[0, 0] += 600
    with pytest.raises(ValueError, match="starts and lengths beyond the tokens"):
        step.run(q, k, v, places, 0.3)


@pytest.mark.parametrize("name", ["k", "v"])
def test_numbers_before_that_do_not_fit_are_left_to_the_ordinary_way(name):
    heads, places, q, k, v = before_call()
    for how in (torch.Tensor.bfloat16, lambda x: x[:, :8], lambda x: x.T.contiguous().T, lambda x: x.to("meta")):
        other = replace(places[0].before, **{name: how(getattr(places[0].before, name))})
        assert native.Step(heads).run(q, k, v, [places[0]._replace(before=other), places[1]], 0.3) is None
    assert native.Step(heads).run(q, k, v, places, 0.3) is not None, "a control"


def test_the_ordinary_way_reads_the_same_before():
    heads, places, q, k, v = before_call()

    def store(own):
        return SimpleNamespace(
            heads=own, shown=lambda some, before: HeadKV(own, some if before is None else [before, *some], None)
        )

    stores = [store(own) for own in heads]
    layer = SimpleNamespace(stores=stores, selections=[None, None], whole=True, seen=0)
    parts = Pending(layer, k, v, places, 9).write()
    assert [len(part.segments) for part in parts] == [2, 1] and parts[0].segments[0] is places[0].before
    assert parts[0].dtype == torch.float32 and (layer.whole, layer.seen) == (True, 9)
    out = torch.cat([native.attend(part.heads.take(q, 2), part.segments, ALL, Scores(0.3))[0] for part in parts], 1)
    got = native.Step(heads).run(q, k, v, places, 0.3)
    order = [2 * n + g for one in heads for n in one.kv_heads for g in range(2)]
    assert torch.equal(got[:, 0][:, order], out[:, :, 0])
