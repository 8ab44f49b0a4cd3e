"""``store: sink_recent_compensated`` against its rule: every attention call from all keys ever written."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import re

import pytest
import torch
from helpers.device_reads import CountReads
from helpers.table import Case, pairwise
from helpers.tiny import Shadow, config_for, left_padded, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hf_longctx.model.attention
from hf_longctx import CacheError, ConfigError, LongCtxCache, LongCtxConfig, patch_model
from hf_longctx.kernels import _compensated, cpu
from hf_longctx.layout.reads import Averaged
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment
from hf_longctx.stores.base import SLACK, spare
from hf_longctx.stores.sink_recent_compensated import Growing, SinkRecentCompensated

DECODED = 3
WORD = "sink_recent_compensated"
CASES = [(case, case.window[1]) for case in pairwise() if case.roles != "retrieval"]
GROWING = [
    (Case("llama", 1, "streaming", 257, "padded", "odd chunks", (4, 5), "auto"), {"min": 5, "fraction": 0.3}),
    (Case("mistral", 4, "mixed", 257, "one", "chunks", (0, 16), "reference"), {"min": 16, "fraction": 0.9}),
    (Case("qwen2", 7, "by layer", 65, "three", "one shot", (16, 1), "auto"), {"min": 1, "fraction": 0.01}),
    (Case("qwen3", 4, "mixed", 300, "padded", "first chunk all pads", (7, 1), "auto"), {"min": 1, "fraction": 0.5}),
]


def window(recent: int | dict, i: int) -> int:
    """Tokens of the window of the query at row position i, from the rule alone."""
    if isinstance(recent, int):
        return recent
    return max(recent["min"], int(recent["fraction"] * (i + 1)))


def expected(q, k, v, sink, recent, scale, compensated=True):
    """Attention ``[H, T, D]`` of one row without pads: q ``[H, T, D]``, the last T of S tokens; k, v ``[H, S, D]``."""
    first = k.shape[1] - q.shape[1]
    outs = []
    for i in range(first, k.shape[1]):
        j = torch.arange(i + 1)
        sees = (j < sink) | (i - j < window(recent, i))
        keys, values = k[:, : i + 1][:, sees], v[:, : i + 1][:, sees]
        scores = (keys @ q[:, i - first, :, None])[..., 0] * scale
        if compensated and not sees.all():
            gone = ~sees
            mean_k, mean_v = (x[:, : i + 1][:, gone].mean(1) for x in (k, v))
            score = (mean_k * q[:, i - first]).sum(-1, keepdim=True) * scale + gone.sum().double().log()
            scores, values = torch.cat([scores, score], -1), torch.cat([values, mean_v[:, None]], 1)
        outs.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(outs, 1)


class Watch(Shadow):
    """`Shadow` with this store's rule in place of the dense mask."""

    compensated = True

    def check(self, module, q, kept, out, given: dict) -> None:
        k, v = self.keys[module.layer_idx]
        rows, plan, group = kept.forward.rows, module.longctx_plan, q.shape[1] // k.shape[1]
        store, everything = self.config.stores.streaming, 10**9
        recent = store.recent if isinstance(store.recent, int) else vars(store.recent)
        rules = {"R": (0, everything), "S": (store.sink, recent if not self.off else recent - self.off)}
        if plan.window is not None:
            rules = dict.fromkeys("RS", (0, plan.window))
        for row, start in enumerate(rows.starts or (0,) * q.shape[0]):
            pads = min(max(0, start - rows.past), q.shape[2])
            for head, role in enumerate(plan.letters if pads < q.shape[2] else ""):
                own = slice(head * group, (head + 1) * group)
                keys, values = (x[row, head, start:].expand(group, -1, -1) for x in (k, v))
                means = self.compensated and role == "S" and plan.window is None
                want = expected(q[row, own, pads:], keys, values, *rules[role], given["scaling"], means)
                got = out[row, pads:, own].transpose(0, 1)
                assert not torch.isnan(got).any()
                self.differ(module.layer_idx, got, want)
        self.calls += 1


@pytest.fixture
def watch(monkeypatch):
    yield lambda config, **kwargs: Watch(monkeypatch, config, **kwargs)
    monkeypatch.undo()
    hf_longctx.model.attention.register()


def configured(model, roles="mixed", sink=4, recent=16, **top) -> LongCtxConfig:
    config = config_for(model, roles, **top)
    return config.override(stores={"streaming": {"store": WORD, "sink": sink, "recent": recent}})


def patched_tiny(roles="mixed", sink=4, recent=16, family="llama", **kwargs):
    model = tiny_model(family, torch.float64, **kwargs)
    return patch_model(model, configured(model, roles, sink, recent))


def read(model, cache, ids, mask=None) -> torch.Tensor:
    """Feed new tokens; the logits of the last one."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


def chunks_of(case: Case) -> list[int]:
    total = case.tokens
    if case.mode == "one shot" or total < 3:
        return [total]
    if case.mode == "first chunk all pads":
        return [total // 2, total - total // 2]
    size = 16 if case.mode == "chunks" else 7
    return [min(size, total - done) for done in range(0, total, size)]


def run(model, case: Case) -> None:
    total = case.tokens
    lengths = {"one": [total], "three": [total] * 3, "padded": [total, max(1, total // 3), 1]}[case.batch]
    ids, mask = left_padded([length + DECODED for length in lengths])
    cache, done = LongCtxCache(model), 0
    for count in [*chunks_of(case), *[1] * DECODED]:
        done += count
        read(model, cache, ids[:, done - count : done], mask[:, :done] if case.batch == "padded" else None)


@pytest.mark.parametrize(("case", "recent"), [*CASES, *GROWING], ids=str)
def test_every_attention_call_follows_the_rule(case, recent, watch):
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = configured(model, case.roles, case.window[0], recent, kernel=case.kernel)
    patch_model(model, config)
    seen = watch(config)
    run(model, case)
    assert seen.calls == 3 * (len(chunks_of(case)) + DECODED)
    assert seen.error <= 1e-12


def test_a_window_off_by_one_and_a_missing_mean_are_seen(watch):
    case = Case("llama", 4, "mixed", 65, "padded", "odd chunks", (4, 16), "auto")
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = configured(model, case.roles, *case.window)
    patch_model(model, config)
    seen = watch(config, recent_off_by=1)
    run(model, case)
    assert seen.error > 1e-4
    seen.off = 0
    seen.errors.clear()
    seen.keys.clear()
    run(model, case)
    assert seen.error <= 1e-12
    seen.compensated = False
    seen.keys.clear()
    run(model, case)
    assert seen.error > 1e-4


RECENTS = [24, {"min": 24, "fraction": 0.4}]


@pytest.mark.spanning
@pytest.mark.parametrize("recent", RECENTS)
@pytest.mark.parametrize("lengths", [[3], [40, 25, 1]])
def test_token_by_token_from_the_first_on(lengths, recent, watch):
    model = tiny_model("llama", torch.float64)
    config = configured(model, "mixed", 4, recent)
    patch_model(model, config)
    seen, cache = watch(config), LongCtxCache(model)
    ids, mask = left_padded([length + 50 for length in lengths])
    for at in range(ids.shape[1]):
        read(model, cache, ids[:, at : at + 1], mask[:, : at + 1] if len(lengths) > 1 else None)
    assert seen.calls == 3 * ids.shape[1] and seen.error <= 1e-12


@pytest.mark.spanning
@pytest.mark.parametrize("recent", RECENTS)
@pytest.mark.parametrize(
    ("lengths", "max_tokens"),
    [([300], None), ([300, 300], 900), ([300, 120, 9], None), ([300, 120, 9], 900), ([30, 25, 1], 900)],
)
def test_random_steps_and_rollbacks_follow_the_rule(lengths, max_tokens, recent, watch):
    model, rng = tiny_model("llama", torch.float64, layers=2), random.Random(len(lengths))
    config = configured(model, "mixed", 4, recent)
    patch_model(model, config)
    ids, mask = left_padded([length + 600 for length in lengths])
    seen, cache, at = watch(config), LongCtxCache(model, max_tokens=max_tokens), 0
    moved = 0
    for step in [max(lengths), *(rng.choice([1, 1, 1, 2, 5, 17, 60]) for _ in range(60))]:
        if at and rng.random() < 0.45:
            back = min(rng.choice([1, 3, 20, 70]), at - 1)
            cache.crop(-back if rng.random() < 0.5 else at - back)
            at -= back
            seen.keys = {layer: (k[:, :, :at], v[:, :, :at]) for layer, (k, v) in seen.keys.items()}
        step = min(step, ids.shape[1] - at)
        low = cache.layers[0].stores[1].low
        read(model, cache, ids[:, at : at + step], mask[:, : at + step] if len(set(lengths)) > 1 else None)
        at += step
        moved += cache.layers[0].stores[1].low > low
        assert cache.get_seq_length() == at
    assert seen.error <= 1e-10
    assert moved or lengths[0] < 100, "the buffer was never compacted"


def test_a_rollback_that_forgets_the_sums_is_seen(watch, monkeypatch):
    model = tiny_model("llama", torch.float64, layers=1)
    config = configured(model, "streaming")
    patch_model(model, config)
    ids = torch.randint(3, 97, (1, 320))
    errors = []
    for forget in (False, True):
        seen, cache = watch(config), LongCtxCache(model)
        read(model, cache, ids[:, :300])
        store = cache.layers[0].stores[0]
        sums = store.state["k"].clone()
        cache.crop(-20)
        if forget:
            store.state["k"].copy_(sums)
        seen.keys = {layer: (k[:, :, :280], v[:, :, :280]) for layer, (k, v) in seen.keys.items()}
        seen.errors.clear()
        read(model, cache, ids[:, 280:])
        errors.append(seen.error)
    assert errors[0] <= 1e-12 < 1e-4 < errors[1]


def contents(cache) -> list[torch.Tensor]:
    return [tensor.nan_to_num(7.0) for layer in cache.layers for tensor in layer.tensors()]


@pytest.mark.parametrize("recent", [16, {"min": 16, "fraction": 0.4}])
def test_a_rollback_may_use_the_whole_slack_and_no_more(recent):
    model = patched_tiny(recent=recent)
    ids = torch.randint(3, 97, (1, 900))
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :700])
    store, before = cache.layers[0].stores[1], contents(cache)
    oldest = store.oldest_crop(700)
    assert store.low == store.spec.edge(700 - SLACK - 1) == store.spec.edge(oldest - 1) > store.spec.edge(oldest - 2)
    assert 700 - SLACK - 1 <= oldest <= 700 - SLACK and (recent != 16 or oldest == 700 - SLACK)
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(oldest - 1)
    with pytest.raises(CacheError, match="cannot go back"):
        store.crop(Rows(1, 0, 700), oldest - 1)
    assert all(map(torch.equal, before, contents(cache))) and len(before) == 3 * (2 + 4 + 2)
    cache.crop(oldest)
    got = read(model, cache, ids[:, oldest : oldest + 30])
    torch.testing.assert_close(got, read(model, LongCtxCache(model), ids[:, : oldest + 30]), rtol=0, atol=1e-6)


def test_a_cache_of_pads_alone_can_go_back(watch):
    model = tiny_model("llama", torch.float64)
    config = configured(model, "mixed", 4, 6)
    patch_model(model, config)
    ids, mask = left_padded([20, 3])
    seen, cache = watch(config), LongCtxCache(model)
    read(model, cache, ids[:, :12], torch.zeros_like(mask[:, :12]))
    cache.crop(-7)
    seen.keys = {layer: (k[:, :, :5], v[:, :, :5]) for layer, (k, v) in seen.keys.items()}
    mask[:, :5] = 0
    for low, high in ((5, 6), (6, 18), (18, 19), (19, 20)):
        read(model, cache, ids[:, low:high], mask[:, :high])
    assert seen.error <= 1e-12


@pytest.mark.parametrize("recent", [6, {"min": 6, "fraction": 0.4}])
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_beams_copies_forks_and_pickles(max_tokens, recent):
    model = patched_tiny(recent=recent)
    ids, mask = left_padded([60, 9, 33])
    more = torch.ones(3, 1, dtype=mask.dtype)
    cache = LongCtxCache(model, max_tokens=max_tokens)
    read(model, cache, ids, mask)
    step, longer = torch.tensor([[5], [6], [7]]), torch.cat([mask, more], 1)
    want = read(model, copy.deepcopy(cache), step, longer)

    def same(changed, rows):
        got = read(model, changed, step[rows], longer[rows])
        torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-12)

    beams, order = copy.deepcopy(cache), torch.tensor([2, 0, 0])
    beams.reorder_cache(order)
    same(beams, order)
    doubled = pickle.loads(pickle.dumps(cache))
    assert doubled.nbytes == cache.nbytes
    doubled.batch_repeat_interleave(2)
    same(doubled, torch.arange(3).repeat_interleave(2))
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    same(chosen, torch.tensor([1]))
    chosen.crop(-8)
    assert chosen.get_seq_length() == 53

    fork = cache.fork()
    for _ in range(3):
        read(model, fork, step, longer)
        longer = torch.cat([longer, more], 1)
    longer = torch.cat([mask, more], 1)
    same(cache, torch.arange(3))
    state = cache.layers[0].stores[1].state["k"]
    assert not torch.equal(state, fork.layers[0].stores[1].state["k"])


def test_reset_frees_and_starts_anew():
    model = patched_tiny()
    cache = LongCtxCache(model)
    ids = torch.randint(3, 97, (2, 400))
    want = read(model, cache, ids)
    cache.reset()
    store = cache.layers[0].stores[1]
    assert (cache.nbytes, cache.get_seq_length(), store.low, store.begin) == (0, 0, 0, 0)
    assert torch.equal(read(model, cache, ids), want)


def slots_of(store) -> int:
    return sum(segment.k.shape[2] for segment in store.segments.values())


@pytest.mark.parametrize("recent", [300, {"min": 20, "fraction": 0.5}])
@pytest.mark.parametrize("sink", [0, 4, 700])
@pytest.mark.parametrize("prompt", [1, 20, 63, 700, 3000])
def test_memory_is_bounded_and_already_there_at_prefill(prompt, sink, recent):
    model = patched_tiny("streaming", sink, recent, layers=1)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, prompt)))
    before, store = cache.nbytes, cache.layers[0].stores[0]
    for step in range(40):
        tokens = store.spec.cached_tokens(prompt + step) + SLACK
        assert slots_of(store) <= tokens + 2 * max(16, tokens // 8)
        sums = 2 * 8 * 8 * 4
        assert cache.nbytes == 2 * slots_of(store) * 8 * 8 * 4 + sums
        read(model, cache, torch.randint(3, 97, (1, 1)))
        if step == 0:
            assert cache.nbytes == before, "the first decoded token must not copy the cache"


@pytest.mark.parametrize("recent", [64, {"min": 64, "fraction": 0.3}])
def test_decoded_tokens_move_and_allocate_seldom(recent):
    model = patched_tiny("streaming", recent=recent, layers=1)
    cache, rooms, moves = LongCtxCache(model), set(), 0
    read(model, cache, torch.randint(3, 97, (1, 700)))
    store = cache.layers[0].stores[0]
    spares = spare(store.spec.held(700))
    for _ in range(700):
        low = store.low
        read(model, cache, torch.randint(3, 97, (1, 1)))
        rooms.add(store.segments["recent"].k.shape[2])
        moves += store.low > low
    assert store.low > 700 and moves <= 700 // spares + 1
    made = sorted(rooms)
    assert (len(made) == 1) is isinstance(recent, int)
    assert all(16 * later >= 17 * room - 16 for room, later in itertools.pairwise(made)), "a sixteenth at a time"


@pytest.mark.parametrize("recent", [64, {"min": 64, "fraction": 0.3}])
def test_max_tokens_never_allocates_the_cache_again(recent):
    model = patched_tiny("streaming", recent=recent, layers=1)
    cache = LongCtxCache(model, max_tokens=900)
    read(model, cache, torch.randint(3, 97, (1, 390)))
    held = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    for _ in range(510):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()] == held
    with pytest.raises(CacheError, match="max_tokens=900"):
        read(model, cache, torch.randint(3, 97, (1, 1)))


@pytest.mark.parametrize("recent", [5, {"min": 5, "fraction": 0.3}])
@pytest.mark.parametrize("lengths", [[70], [70, 31, 2]])
def test_without_a_cache_and_with_a_dense_one_the_rule_is_the_same(lengths, recent):
    model = patched_tiny(recent=recent)
    ids, mask = left_padded(lengths)
    cache, dense = LongCtxCache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    for low, high in ((0, 30), (30, 69), (69, 70)):
        got = [read(model, kept, ids[:, low:high], mask[:, :high]) for kept in (cache, dense)]
    for one in got:
        torch.testing.assert_close(one, want, rtol=0, atol=1e-6)
    plain = patch_model(
        model, configured(model, recent=recent).override(stores={"streaming": {"store": "sink_recent"}})
    )
    with torch.no_grad():
        assert (plain(ids, attention_mask=mask, use_cache=False).logits[:, -1] - want).abs().max() > 1e-4


def test_sliding_layers_keep_the_model_s_own_window(watch):
    for family in ("mistral", "qwen2"):
        model = tiny_model(family, torch.float64, sliding=9)
        config = configured(model, "streaming", 2, 5)
        patch_model(model, config)
        seen, cache = watch(config), LongCtxCache(model)
        ids = torch.randint(3, 97, (1, 60))
        for low, high in ((0, 40), (40, 59), (59, 60)):
            read(model, cache, ids[:, low:high])
        assert seen.error <= 1e-12
        own = sum(type(layer.stores[0].spec) is SinkRecentCompensated for layer in cache.layers)
        assert own == {"mistral": 0, "qwen2": 2}[family]


# The prefill function by itself.


def prefill(q, k, v, sink, recent, carried=0, **kwargs):
    """Attention of the last T of S tokens; the first ``carried`` dropped ones come as sums."""
    spec = SinkRecentCompensated(sink, recent if isinstance(recent, int) else Growing(**recent))
    end, first = k.shape[2], sink + carried
    edges = torch.tensor([spec.edge(i) for i in range(end - q.shape[2], end)])
    band = (k[:, :, first:], v[:, :, first:])
    dropped = tuple(x[:, :, sink:first].double().sum(2, keepdim=True) for x in (k, v)) if carried else None
    reads = Averaged(sink, first, end, spec.edge, edges, dropped)
    segments = [Segment(*pair, pair[0].shape[2]) for pair in ((k[:, :, :sink], v[:, :, :sink]), band)]
    return cpu.attend(q, segments, reads, Scores(0.4))[0]


def numbers(tokens, queries, dtype=torch.float64, grad=False):
    shapes = ((2, 6, queries, 8), (2, 3, tokens, 8), (2, 3, tokens, 8))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)


@pytest.mark.parametrize(("queries", "temporary"), [(128, 1 << 22), (7, 1), (5, 4000)])
@pytest.mark.parametrize("recent", [1, 9, {"min": 3, "fraction": 0.3}])
@pytest.mark.parametrize(("sink", "carried", "new"), [(4, 0, 150), (0, 0, 40), (5, 60, 50), (200, 0, 150), (4, 0, 1)])
def test_blocks_of_any_size_give_the_rule_s_answer(sink, carried, new, recent, queries, temporary, monkeypatch):
    monkeypatch.setattr(_compensated, "QUERIES", queries)
    monkeypatch.setattr(_compensated, "FEWEST", 3)
    monkeypatch.setattr(_compensated, "TEMPORARY", temporary)
    q, k, v = numbers(150, new)
    got = prefill(q, k, v, sink, recent, carried)
    for row in range(2):
        spread = (x[row].repeat_interleave(2, 0) for x in (k, v))
        torch.testing.assert_close(got[row], expected(q[row], *spread, sink, recent, 0.4), rtol=0, atol=1e-12)


def test_prefill_has_the_gradient_of_its_formula():
    q, k, v = numbers(23, 23, grad=True)
    assert torch.autograd.gradcheck(lambda *x: prefill(*x, 2, 5), (q, k, v), fast_mode=True)
    prefill(q, k, v, 2, 5).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    rows = [expected(q[row], *kv, 2, 5, 0.4) for row, kv in enumerate(zip(*wide, strict=True))]
    torch.stack(rows).square().sum().backward()
    for mine, x in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, x.grad, rtol=0, atol=1e-11)
        assert x.grad[:, :, 3:8].abs().max() > 1e-3


def test_no_temporary_grows_with_the_prompt():
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and tokens not in out.shape:  # not the output, q, k, v and their views
                self.most = max(self.most, out.numel() * out.itemsize)
            return out

    sizes = []
    for tokens in (3001, 12001):
        q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
        with Largest() as seen:
            prefill(q, k, v, 4, 500)
        sizes.append(seen.most)
    assert sizes[0] == sizes[1] == 4 * 4 * 128 * (4 + 500 + 128 + 1)


@pytest.mark.parametrize("recent", [6, {"min": 6, "fraction": 0.3}])
@pytest.mark.parametrize("lengths", [[120, 120], [120, 31, 12]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_decodes_like_it_prefills(dtype, lengths, recent):
    """With head_dim 16 the native kernel runs, where there is one; the answer is float64's but for rounding."""
    wide = tiny_model("llama", torch.float64, head_dim=16)
    model = tiny_model("llama", dtype, head_dim=16)
    model.load_state_dict(wide.state_dict())
    logits, (ids, mask) = [], left_padded(lengths)
    for one in (wide, model):
        patch_model(one, configured(one, "streaming", 4, recent))
        cache = LongCtxCache(one)
        read(one, cache, ids[:, :100], mask[:, :100])
        steps = [read(one, cache, ids[:, at : at + 1], mask[:, : at + 1]) for at in range(100, 120)]
        logits.append(torch.stack(steps)[4:].double())  # the shortest row begins within these steps
    drift = (logits[0] - logits[1]).abs().mean() / logits[0].abs().mean()
    assert drift < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_training_step_has_the_same_gradients_with_a_cache_and_without():
    model = patched_tiny(recent=5)
    ids, mask = left_padded([40, 17])
    found = []
    for kept in ({"use_cache": False}, {"past_key_values": LongCtxCache(model)}):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **kept).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(found[0]) > 20 and max(grad.abs().max() for grad in found[0]) > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("padded", [False, True])
def test_device_reads_of_a_decode_step_do_not_grow_with_the_layers(padded):
    counts = []
    for layers in (2, 6):
        model = patched_tiny(layers=layers)
        cache = LongCtxCache(model)
        ids, mask = left_padded([60, 9] if padded else [60, 60])
        read(model, cache, ids, mask)
        with CountReads() as count:
            read(model, cache, ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))
        counts.append(count.reads)
    assert counts[0] == counts[1]


# The spec.


def test_the_window_grows_by_one_at_most_and_the_number_of_kept_tokens_is_the_rule_s():
    for recent in (1, 7, Growing(1, 0.9), Growing(30, 0.29), Growing()):
        spec = SinkRecentCompensated(3, recent)
        for i in range(300):
            assert 0 <= spec.edge(i + 1) - spec.edge(i) <= 1
            plain = recent if isinstance(recent, int) else vars(recent)
            sees = sum(j < 3 or i - j < window(plain, i) for j in range(i + 1))
            assert spec.cached_tokens(i + 1) == sees and spec.held(i + 1) >= spec.cached_tokens(i + 1) - 3
    assert spec.cached_tokens(100_000) == 3 + 20_000


@pytest.mark.parametrize(
    ("recent", "message"),
    [
        (0, "recent: got 0, expected a whole number, at least 1"),
        ({"min": 0}, "recent.min: got 0"),
        ({"fraction": 0.0}, "recent.fraction: got 0.0, expected a number, above 0.0 and at most 0.9"),
        ({"fraction": 1}, "recent.fraction: got 1"),
        ({"share": 0.5}, "recent.share: unknown key"),
        ("all", "recent: got 'all', expected a whole number, at least 1 (tokens), or a mapping of min and fraction."),
    ],
)
def test_a_wrong_window_is_refused(recent, message):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=re.escape(message)):
        configured(model, recent=recent)


def test_a_config_survives_yaml(tmp_path):
    model = tiny_model("llama")
    for recent in (5, {}, {"min": 7, "fraction": 0.25}):
        config = configured(model, recent=recent)
        config.to_yaml(tmp_path / "config.yaml")
        assert LongCtxConfig.from_yaml(tmp_path / "config.yaml") == config
    assert configured(model, recent={}).stores.streaming.recent == Growing(4000, 0.2)
    wider = config.override(stores={"streaming": {"recent": {"min": 9}}})
    assert wider.stores.streaming.recent == Growing(9, 0.25)
    assert wider.override(stores={"streaming": {"recent": 9}}).stores.streaming.recent == 9
