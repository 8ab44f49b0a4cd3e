"""``store: thin``: attention over what it keeps equals attention over keys whose least needed channels are zero."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.forgeries import Forger
from helpers.one_layer import SCALE, OneLayer
from helpers.tiny import config_for, tiny_model

from hf_longctx import CacheError, ConfigError, LongCtxCache, patch_model
from hf_longctx.kernels import base, reference
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import ALL, CAUSAL
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment
from hf_longctx.layout.thinned import Thinned
from hf_longctx.stores.base import SLACK, Reserve
from hf_longctx.stores.thin import Thin

KV_HEADS, GROUP, DIM = 3, 2, 10


def patched(dtype=torch.float64, kernel="auto", dim=DIM, **fields):
    model = tiny_model("llama", dtype, layers=1, kv_heads=KV_HEADS, group=GROUP, head_dim=dim)
    stores = {"retrieval": {"store": "thin", **fields}}
    return patch_model(model, config_for(model, "retrieval", stores=stores, kernel=kernel))


class Driver(OneLayer):
    """A layer that thins, beside the keys of which the rule made some channels zero."""

    def __init__(self, starts=(0,), max_tokens=None, dtype=torch.float64, kernel="auto", dim=DIM, **fields):
        super().__init__(patched(dtype, kernel, dim, **fields), starts, max_tokens)
        self.asked = torch.empty(len(starts), self.heads, 0, dim, dtype=dtype)
        self.least: list[torch.Tensor | None] = [None] * len(starts)
        self.begun: int | None = 0  # slot where the prompt that is being read began; None: tokens are decoded

    def step(self, count):
        if self.begun is None and count > 1:
            self.begun = self.seen
        out = super().step(count)
        self.asked = torch.cat([self.asked, self.q], 2)
        return out

    def reads_prompt(self, count):
        return self.begun is not None

    def begin(self):
        self.cache._check_room(self.rows)
        self.cache.starts, self.cache.forward = self.rows.starts, self.forward  # it is not asked where a prompt ends

    def end(self):
        """A prompt ends here: by the store, and by the rule, channel by channel."""
        starts = tuple(min(start, self.seen) for start in self.starts)
        self.store.end_prompt(Rows(len(starts), 0, self.seen, starts if any(starts) else None))
        end, spec = self.seen - self.spec.recent, self.spec
        self.k = self.k.clone()
        for row, start in enumerate(starts):
            if start >= end:
                continue
            if self.least[row] is None:
                first = max(start, self.seen - spec.window, self.begun or 0)
                q = self.asked[row, :, first:].unflatten(0, (KV_HEADS, GROUP))
                need = q.square().mean(2).mean(1) * self.k[row, :, start:].square().mean(1)
                self.least[row] = need.argsort(1)[:, : int(self.dim * spec.ratio)]
            for head, channels in enumerate(self.least[row]):
                self.k[row, head, start:end, channels] = 0
        self.begun = None

    def back(self, target):
        self.cache.crop(target)
        self.k, self.v, self.asked = (x[:, :, :target] for x in (self.k, self.v, self.asked))

    def rows_of(self, cache, picked, before) -> None:
        """Go on with another cache, whose rows are ``picked`` of those ``before`` (`now`)."""
        self.cache = cache
        self.k, self.v, self.asked = (x[picked] for x in before[:3])
        self.starts, self.least = tuple(before[3][row] for row in picked), [before[4][row] for row in picked]
        self.begun = before[5]

    @property
    def now(self):
        return self.k, self.v, self.asked, self.starts, list(self.least), self.begun


FIELDS = [
    {"ratio": 0.4, "window": 8, "recent": 6},
    {"ratio": 0.7, "window": 1, "recent": 0},
    {"ratio": 0.1, "window": 200, "recent": 33},
]


@pytest.mark.parametrize("starts", [(0,), (0, 0), (0, 37, 118), (3, 60)])
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("cuts", [(120,), (50, 1, 40, 29), (119, 1)])
def test_attention_equals_zeroed_channels_however_the_prompt_came(starts, fields, cuts):
    run = Driver(starts, **fields)
    for count in cuts:
        run.check(count)
    run.end()
    assert run.store.past == 120 - fields["recent"]
    for count in (1, 1, 3, 1, 30, 1):
        run.check(count)
    run.check(40)
    run.end()
    for count in (1, 1, 2, 50, 1):
        run.check(count)
    assert len(run.store.pieces) == 1, "nobody else reads it, so both prompts are one piece"
    channels = run.store.pieces["thin 0"].channels
    assert channels.shape == (len(starts), KV_HEADS, DIM - int(DIM * fields["ratio"]))
    assert (channels.diff(dim=2) > 0).all()


@pytest.mark.quick
def test_what_is_not_the_rule_is_seen():
    run = Driver((0, 37), ratio=0.4, window=8, recent=6)
    run.check(120)
    whole = run.k
    run.end()
    run.check(1)
    thinned, run.k = run.k, torch.cat([whole, run.k[:, :, -1:]], 2)
    out = run.step(1)
    assert (out - run.expected()).abs().max() > 1e-3, "every channel"
    run.k = torch.cat([thinned.roll(1, 3), run.k[:, :, -1:]], 2)
    assert (out - run.expected()).abs().max() > 1e-3, "other channels"
    run.k = torch.cat([thinned, run.k[:, :, -1:]], 2)
    assert (out - run.expected()).abs().max() <= 1e-12


@pytest.mark.parametrize("kernel", ["cpu", "native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_reads_the_rest(kernel, dtype):
    run = Driver((0, 37), dtype=dtype, kernel=kernel, dim=16, ratio=0.4, window=8, recent=6)
    run.step(5000)
    before = run.store.append
    run.end()
    for count in (1, 20, 60, 1):
        out = run.step(count)
        k, v, q = (x.double() for x in (run.k, run.v, run.q))
        pads = torch.tensor(run.starts)[:, None, None, None] > torch.arange(run.seen)
        visible = reference.causal_visible(count, run.seen) & ~pads
        want = reference.attention(q, k, v, visible, SCALE)[0]
        # In float32 the scores, some hundreds here, are rounded by 3e-5 each.
        assert (out.double() - want).abs().max() <= max(8 * torch.finfo(dtype).eps, 1e-4) * want.abs().max()
    assert "streamed" in run.forward.log.used and before == run.store.append


def test_without_a_ratio_it_is_full_bit_for_bit():
    outs, sizes = [], []
    for store in ({"store": "thin", "ratio": 0.0}, {"store": "full"}):
        torch.manual_seed(3)
        ids = torch.randint(3, 97, (2, 90))
        model = tiny_model("llama", torch.float32)
        patch_model(model, config_for(model, "mixed", stores={"retrieval": store}))
        cache, got = LongCtxCache(model), []
        with torch.no_grad():
            for low, high in ((0, 80), (80, 81), (81, 82), (82, 90)):
                if low == 80:
                    end(cache)
                got.append(model(ids[:, low:high], past_key_values=cache).logits)
        outs.append(torch.cat(got, 1))
        sizes.append(cache.nbytes)
    assert torch.equal(*outs) and sizes[0] == sizes[1]


def end(cache):
    for layer in cache.own:
        for store in layer.stores:
            store.end_prompt(Rows(cache.batch_size, 0, cache.seen, cache.starts))


def test_channels_are_chosen_once_and_sequence_by_sequence():
    """A short prompt chooses none: a sequence does where its own first prompt of more than ``recent`` tokens ends."""
    run = Driver((0, 74), ratio=0.4, window=8, recent=6)
    run.check(80)  # the second sequence has 6 tokens
    run.end()
    first = run.store.pieces["thin 0"].channels
    for count in (1, 1, 30):
        run.check(count)
    assert run.store.state, "the second sequence chooses by these queries"
    run.end()
    for count in (1, 30, 1):
        run.check(count)
    assert not run.store.state and not run.store.asked
    assert torch.equal(run.store.pieces["thin 0"].channels[0], first[0])
    assert not torch.equal(run.store.pieces["thin 0"].channels[1], first[1])
    few = Driver((0,), ratio=0.4, window=8, recent=90)
    few.check(80)
    few.end()
    few.check(1)
    assert not few.store.pieces and not few.store.state


def test_an_end_where_nothing_came_changes_nothing():
    run = Driver(ratio=0.4, window=8, recent=6)
    run.check(60)
    run.end()
    before = list(run.store.tensors())
    run.end()
    assert all(map(torch.Tensor.is_set_to, before, run.store.tensors()))
    run.check(1)


@pytest.mark.parametrize("starts", [(0,), (0, 37, 118)])
def test_decoded_tokens_are_taken_back_and_what_is_thinned_is_not(starts):
    run = Driver(starts, ratio=0.4, window=8, recent=6)
    run.check(140)
    run.back(120)  # the queries of a prompt that is being read are taken back with its tokens
    run.check(3)
    run.end()
    run.check(1)
    run.check(30)
    run.back(123)
    assert run.cache.oldest_crop == 123
    for count in (1, 2, 40):
        run.check(count)
    with pytest.raises(CacheError, match="cannot crop from 166 to 122"):
        run.cache.crop(122)
    run.check(1)
    run.end()
    run.check(1)
    assert run.cache.oldest_crop == 167
    run.cache.reset()
    assert run.cache.nbytes == 0 and run.cache.oldest_crop == 0 and (run.store.first, run.store.asked) == (0, 0)


def test_without_queries_the_keys_alone_choose():
    """A cache that was filled by hand, and one whose queries were all taken back."""
    by_hand, taken = Driver(ratio=0.4, window=8, recent=6), Driver(ratio=0.4, window=8, recent=6)
    k, v = torch.randn(2, 1, KV_HEADS, 60, DIM, dtype=torch.float64)
    by_hand.cache.update(k, v, 0)
    by_hand.k, by_hand.v = k, v
    by_hand.asked = torch.ones(1, KV_HEADS * GROUP, 60, DIM, dtype=torch.float64)
    taken.step(60)
    taken.step(SLACK + 8)
    taken.back(60)
    taken.asked = by_hand.asked
    for run in (by_hand, taken):
        run.end()
        run.check(1)
        run.check(30)


@pytest.mark.parametrize("starts", [(0,), (0, 37, 118)])
def test_rows_copies_and_forks_go_on_alike(starts):
    run = Driver(starts, ratio=0.4, window=8, recent=6)
    run.check(120)
    texts = [(run.cache.fork(), run.now)]
    run.end()
    texts += [(run.cache.fork(), run.now), (pickle.loads(pickle.dumps(run.cache)), run.now)]
    run.check(1)
    texts += [(copy.deepcopy(run.cache), run.now), (run.cache, run.now)]
    rows = list(range(len(starts)))
    for nth, (cache, before) in enumerate(texts):
        for change, picked in (
            (lambda cache: cache.reorder_cache(torch.tensor(rows[::-1])), rows[::-1]),
            (lambda cache: cache.batch_repeat_interleave(2), [row for row in rows for _ in range(2)]),
            (lambda cache: cache.batch_select_indices(torch.tensor([rows[-1]])), [rows[-1]]),
        ):
            other = cache.fork()
            change(other)
            run.rows_of(other, picked, before)
            run.check(20)
            if nth == 0 or picked == rows[::-1]:
                run.end()
            for count in (1, 1, 30):
                run.check(count)


def test_forks_and_sequences_of_one_prompt_share_what_is_thinned():
    run = Driver(ratio=0.4, window=8, recent=6)
    run.check(500)
    run.end()
    one, before = run.cache, run.now
    other = one.fork()
    assert pointers(one) == pointers(other)
    size = other.nbytes
    other.batch_repeat_interleave(4)
    assert other.nbytes < 1.1 * size and pointers(one) == pointers(other)
    for cache, picked in ((other, [0] * 4), (one, [0])):
        run.rows_of(cache, picked, before)
        for count in (20, 1, 9):
            run.check(count)
        run.end()
        for count in (1, 12):
            run.check(count)
        run.end()
        run.check(1)
        assert list(run.store.pieces) == ["thin 0", "thin 1"], "the prompt is still one memory"
    assert pointers(one)[:3] == pointers(other)[:3]


def pointers(cache):
    return [x.data_ptr() for piece in cache.layers[0].stores[0].pieces.values() for x in piece.tensors()]


@pytest.mark.parametrize("max_tokens", [None, 700])
@pytest.mark.parametrize("tokens", [1, 6, 7, 100, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_its_bytes_are_those_that_were_said(tokens, max_tokens, dtype):
    run = Driver(max_tokens=max_tokens, dtype=dtype, ratio=0.4, window=8, recent=6)
    run.step(tokens)
    run.end()
    size = dtype.itemsize
    assert run.cache.nbytes == KV_HEADS * run.spec.nbytes(tokens, DIM, size, Reserve(max_tokens)).device
    held = run.cache.nbytes
    for _ in range(10):
        run.step(1)
    assert run.cache.nbytes == held, "there is room"
    thin = max(0, tokens - 6)
    want = (thin * (6 + 10) + (tokens - thin) * 20) * size + (48 if thin else 0)
    assert run.spec.nbytes(tokens, DIM, size).device == want
    assert run.spec.capacity(tokens, Reserve(max_tokens)) == (max_tokens or tokens + max(16, (tokens - thin) // 8))
    if max_tokens:
        with pytest.raises(CacheError, match="max_tokens=700"):
            run.step(700 - tokens)


def test_a_fifth_of_the_bytes_is_saved():
    """At a ratio of 0.4, of a long prompt: 20 % of keys and values."""
    assert Thin().kept(128) == 77 and Thin(ratio=0.3).kept(10) == 7 and Thin(ratio=0.0).kept(10) == 10
    share = Thin().nbytes(32768, 128, 2).device / (2 * 32768 * 128 * 2)
    assert 0.8 < share < 0.803
    assert Thin(ratio=0.0).nbytes(1000, 128, 2).device == 2 * 1000 * 128 * 2


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("starts", [(0,), (0, 37, 118)])
def test_a_saved_cache_goes_on(starts, ended, tmp_path):
    run = Driver(starts, ratio=0.4, window=8, recent=6)
    run.check(120)
    if ended:
        run.end()
        run.check(1)
        run.cache = run.cache.fork()
        run.check(30)
        run.end()
    run.cache.token_ids.append(0, torch.full((len(starts), run.seen), 5))
    run.cache.save(tmp_path / "a", model=run.model)
    held = run.cache.nbytes
    run.cache = LongCtxCache.load(tmp_path / "a", run.model)
    assert run.cache.nbytes <= held and run.cache.oldest_crop == (151 if ended else 0)
    run.cache.save(tmp_path / "b", model=run.model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    run.end()
    for count in (1, 30, 1):
        run.check(count)


def test_forged_files_are_refused(tmp_path):
    model = tiny_model("llama", torch.float32, layers=1)
    patch_model(model, config_for(model, "retrieval", stores={"retrieval": {"store": "thin", "recent": 6}}))
    for ended in (False, True):
        cache = LongCtxCache(model)
        with torch.no_grad():
            model(torch.randint(3, 97, (2, 50)), past_key_values=cache)
        if ended:
            end(cache)
        cache.save(tmp_path / "true")
        forger = Forger(tmp_path / "true")
        assert LongCtxCache.load(tmp_path / "true", model).seen == 50, "a control"
        for edit, said in EDITS[ended]:
            with pytest.raises(CacheError, match=said):
                LongCtxCache.load(forger.write(tmp_path / "false", edit), model)


def changed(ending, how):
    def edit(tensors, told):
        (name,) = (name for name in tensors if name.endswith(ending))
        tensors[name] = how(tensors[name]).contiguous()

    return edit


def numbers(change):
    def edit(tensors, told):
        change(told["kept"][0]["stores"]["retrieval"])

    return edit


EDITS = {
    False: [
        (changed("state.energy", lambda x: x[:, :, :0]), "state.energy: it is"),
        (changed("state.energy", lambda x: x[:, :2]), "state.energy: it is"),
        (numbers(lambda store: store["numbers"].update(asked=51)), "asked: got 51"),
        (numbers(lambda store: store["numbers"].update(asked=0)), "asked: got 0"),
        (numbers(lambda store: store["numbers"].update(asked=49)), "state.energy: it is"),
        (numbers(lambda store: store["numbers"].update(first=50)), "first: got 50"),
        (numbers(lambda store: store["numbers"].update(first=1)), "state.energy: it is"),
    ],
    True: [
        (changed("thin 0.channels", lambda x: x + 5), "channels are not"),
        (changed("thin 0.channels", lambda x: x - 1), "channels are not"),
        (changed("thin 0.channels", lambda x: x * 0), "channels are not"),
        (changed("thin 0.channels", lambda x: x[..., :3]), "channels: it is I64"),
        (changed("thin 0.k", lambda x: x[..., :3]), "thin 0.k: it is F32"),
        (changed("thin 0.k", lambda x: x.repeat(1, 1, 2, 1)), "expected 1 to 44 tokens"),
        (changed("thin 0.v", lambda x: x[:, :, :3]), "thin 0.v: it is F32"),
        (numbers(lambda store: store["segments"][0]["numbers"].update(dim=9)), "dim: got 9"),
        (numbers(lambda store: store["segments"][0]["numbers"].update(rows=3)), "rows: got 3"),
        (numbers(lambda store: store["segments"].reverse()), "its segments are"),
        (numbers(lambda store: store["segments"].pop()), "are in no segment"),
    ],
}


def test_what_was_filled_in_inference_mode_or_under_autocast_goes_on():
    run = Driver(ratio=0.4, window=8, recent=6)
    with torch.inference_mode():
        run.check(60)
        run.end()
        run.check(1)
    assert not any(x.is_inference() for x in run.store.tensors())
    run.k, run.v, run.asked = run.k.clone(), run.v.clone(), run.asked.clone()
    for count in (1, 30, 1):
        run.check(count)
    fork = run.cache.fork()
    with torch.autocast("cpu"):
        kept = fork.update(*torch.randn(2, 1, KV_HEADS, 1, DIM), 0)[0]
    assert {one.dtype for part in kept.parts for one in part.segments} == {torch.float64}


def pieces(tokens=90):
    channels = torch.stack([torch.randperm(DIM)[:6].sort().values for _ in range(2 * KV_HEADS)]).view(2, KV_HEADS, 6)
    k, v = torch.randn(2, KV_HEADS, tokens, 6).double(), torch.randn(2, KV_HEADS, tokens, DIM).double()
    whole = torch.zeros(2, KV_HEADS, tokens, DIM, dtype=torch.float64)
    for row in range(2):
        for head in range(KV_HEADS):
            whole[row, head][:, channels[row, head]] = k[row, head]
    return Thinned(k, v, channels, DIM), whole


def test_whoever_reads_whole_keys_gets_zeros(monkeypatch):
    monkeypatch.setattr("hf_longctx.layout.streamed.BLOCK", 2 * KV_HEADS * DIM * 7)
    thin, whole = pieces()
    blocks = list(thin.blocks())
    assert len(blocks) == 13
    for k, v in (thin.contents(), (torch.cat([one.k for one in blocks], 2), torch.cat([one.v for one in blocks], 2))):
        assert torch.equal(k, whole) and torch.equal(v, thin.v)
    assert torch.equal(thin.span(3, 9)[0], whole[:, :, 3:9])
    slots = torch.randint(0, 90, (2, KV_HEADS, 5))
    k, v = thin.take(slots)
    at = slots[..., None].expand(-1, -1, -1, DIM)
    assert torch.equal(k, whole.gather(2, at)) and torch.equal(v, thin.v.gather(2, at))
    assert torch.equal(thin.alone(slice(1, 2), 4).contents()[0], whole[1:2, :, 4:])
    assert thin.form == (2, KV_HEADS, DIM) and thin.longest == 90


@pytest.mark.parametrize("new", [1, 24, 25, 60])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("pads", [False, True])
def test_few_queries_and_many_read_the_same(new, softcap, first, pads, monkeypatch):
    monkeypatch.setattr("hf_longctx.kernels._thinned.TILE", 32)
    thin, whole = pieces()
    q = torch.randn(2, KV_HEADS * GROUP, new, DIM).double()
    own = Segment(*torch.randn(2, 2, KV_HEADS, new + 3, DIM).double(), new + 3)
    bias = torch.randn(KV_HEADS * GROUP).double() if first else None
    whole = Segment(whole, thin.v, 90)
    if pads:
        hidden = torch.zeros(2, 1, 1, 90).double()
        hidden[1, ..., :70] = float("-inf")
        thin.hidden = whole.bias = hidden
    scores, reads = Scores(SCALE, softcap, None, bias), CAUSAL if new > 1 else ALL
    forward = Forward(Rows(2, 93, new))
    out, lse = base.attend("auto", q, [thin, own], reads, scores, forward, want_lse=True)
    want, known = reference.attend(q, [whole, own], reads, scores)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"ratio": 1.0}, "ratio: got 1.0"), ({"window": 0}, "window: got 0"), ({"recent": -1}, "recent")],
)
def test_fields_are_bounded(fields, said):
    with pytest.raises(ConfigError, match=said):
        patched(**fields)
