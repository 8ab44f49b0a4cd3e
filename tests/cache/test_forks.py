"""Forks of a LongCtxCache: what each goes on to say is what a fresh reading says, and the prompt is held once."""

from __future__ import annotations

import copy
import io
import pickle
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.caches import live_bytes, patched_tiny, read
from helpers.device_reads import CountReads
from helpers.tiny import FAMILIES, SLIDING, config_for, left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model, report
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.layout.segments import Segment
from hf_longctx.stores.base import SLACK, SPARE
from hf_longctx.stores.full import FullStore


class Text:
    """A cache and the tokens that it has read, which a fresh one can read again."""

    def __init__(self, model, cache, ids, mask):
        self.model, self.cache, self.ids, self.mask = model, cache, ids, mask

    @classmethod
    def read(cls, model, lengths, **kwargs):
        text = cls(model, LongCtxCache(model, **kwargs), *left_padded(lengths))
        read(model, text.cache, text.ids, text.given)
        return text

    @property
    def given(self):
        return None if self.mask.all() else self.mask

    def fork(self) -> Text:
        return Text(self.model, self.cache.fork(), self.ids, self.mask)

    def more(self, tokens: int) -> float:
        """Read ``tokens`` random ones; how far the logits are from those of a fresh reading."""
        new = torch.randint(3, 97, (len(self.ids), tokens))
        self.ids, self.mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, torch.ones_like(new)], 1)
        got = read(self.model, self.cache, new, self.given)
        return (got - self.fresh()).abs().max().item()

    def fresh(self) -> torch.Tensor:
        if not self.cache.staggered:
            return read(self.model, LongCtxCache(self.model), self.ids, self.given)
        with torch.no_grad():  # rotary embeddings are rounded: only the same positions give the same logits
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            return self.model(self.ids, attention_mask=self.mask, position_ids=positions).logits[:, -1]

    def back(self, tokens: int) -> None:
        self.cache.crop(-tokens)
        self.ids, self.mask = self.ids[:, :-tokens], self.mask[:, :-tokens]

    def rows(self, picked: list[int], how: str) -> None:
        index = torch.tensor(picked)
        self.cache.reorder_cache(index) if how == "reorder" else self.cache.batch_select_indices(index)
        self.ids, self.mask = self.ids[index], self.mask[index]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.ids, self.mask = self.ids.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)


def walk(model, lengths, seed: int, steps: int = 40, **kwargs) -> float:
    """Random forks, steps, rollbacks and changes of rows of up to six texts; the largest error."""
    rng, worst = random.Random(seed), 0.0
    texts = [Text.read(model, lengths, **kwargs)]
    for _ in range(steps):
        text = rng.choice(texts)
        what = rng.choice(["fork", "fork", "more", "more", "more", "back", "reorder", "select", "repeat", "drop"])
        if what == "fork" and len(texts) < 6:
            texts.append(text.fork())
        elif what == "back":
            text.back(rng.randint(1, 20))
        elif what in ("reorder", "select"):
            text.rows([rng.randrange(len(text.ids)) for _ in range(rng.randint(1, 3))], what)
        elif what == "repeat" and len(text.ids) < 3:
            text.repeat(2)
        elif what == "drop" and len(texts) > 1:
            texts.remove(text)
        for other in rng.sample(texts, min(2, len(texts))):
            worst = max(worst, other.more(rng.choice([1, 1, 2, 5, 17])))
    return worst


@pytest.mark.spanning
@pytest.mark.parametrize("lengths", [[150], [300, 300], [200, 120, 9], [30, 25, 1]])
@pytest.mark.parametrize("max_tokens", [None, 1200])
def test_random_forks_equal_fresh_readings(lengths, max_tokens):
    assert walk(patched_tiny(recent=24), lengths, len(lengths), max_tokens=max_tokens) < 1e-6


@pytest.mark.spanning
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("roles", ["retrieval", "streaming", "by layer"])
def test_every_family_with_and_without_windows(family, roles):
    for sliding in (None, None if family == "llama" else 13):
        model = tiny_model(family, torch.float64, sliding=sliding)
        patch_model(model, config_for(model, roles))
        assert walk(model, [90, 41], 1, steps=8) < 1e-6


@pytest.mark.parametrize("kernel", ["reference", "cpu", "native", "stock"])
def test_every_kernel_reads_several_segments(kernel):
    dtype, limit = (torch.float32, 1e-3) if kernel == "native" else (torch.float64, 1e-6)
    model = tiny_model("llama", dtype, head_dim=16)
    patch_model(model, config_for(model, kernel=kernel))
    assert walk(model, [90], 3, steps=15) < limit
    assert walk(model, [70, 41, 3], 4, steps=15) < limit
    assert kernel in report(model).kernels


def test_a_fork_that_writes_to_shared_memory_is_noticed(monkeypatch):
    monkeypatch.setattr(FullStore, "_share", lambda self: None)
    monkeypatch.setattr(Segment, "copy", copy.copy)
    assert walk(patched_tiny(recent=24), [150], 1) > 1e-3, "a control"


def test_a_rollback_into_the_shared_part_and_on():
    model = patched_tiny()
    first = Text.read(model, [300])
    one = first.fork()
    two = one.fork()
    assert one.more(10) < 1e-6
    three = one.fork()
    assert three.more(5) < 1e-6
    three.back(100)
    assert three.cache.get_seq_length() == 215
    for text in (three, two, one, first):
        assert text.more(7) < 1e-6
    one.cache.crop(-one.cache.get_seq_length())
    assert one.cache.nbytes == 0
    with pytest.raises(CacheError, match="cannot crop"):
        first.fork().cache.crop(20)


def test_streaming_alone_is_copied_and_retrieval_alone_is_shared():
    for roles, shares in (("retrieval", True), ("streaming", False)):
        text = Text.read(patched_tiny(roles), [3000])
        held = text.cache.nbytes
        fork = text.cache.fork()
        both = storage_bytes(
            tensor for cache in (text.cache, fork) for layer in cache.layers for tensor in layer.tensors()
        )
        assert fork.nbytes == text.cache.nbytes == held, "what is shared counts in each"
        assert both == (held if shares else 2 * held)


def test_a_fork_holds_new_tokens_and_rings_alone():
    model = patched_tiny(recent=24, layers=2)
    text = Text.read(model, [3000])
    caches = [text.cache, *(text.cache.fork() for _ in range(9))]
    for cache in caches[1:]:
        read(model, cache, torch.randint(3, 97, (1, 30)))
    held = storage_bytes(tensor for cache in caches for layer in cache.layers for tensor in layer.tensors())
    token = 2 * 8 * 8  # bytes: k and v of one head, 8 numbers in float64
    prefix, rings = (4 * token * slots for slots in (3375, 4 + 24 + SLACK + 1))
    assert held == prefix + 10 * rings + 9 * 4 * token * (30 + SPARE)
    assert report(model).nbytes == caches[-1].nbytes == prefix + rings + 4 * token * (30 + SPARE)


def test_many_rows_over_one_prompt_hold_it_once():
    model = patched_tiny("retrieval", layers=1)
    text = Text.read(model, [3000])
    fork = text.fork()
    fork.repeat(6)
    assert fork.cache.nbytes == text.cache.nbytes
    assert fork.more(11) < 1e-6
    fork.rows([5, 0, 0], "reorder")
    assert fork.more(1) < 1e-6
    own = storage_bytes([t for layer in fork.cache.layers for t in layer.tensors()]) - text.cache.nbytes
    assert own == 3 * 4 * 2 * 8 * 8 * (11 + SPARE)
    alone = LongCtxCache(model)
    read(model, alone, text.ids.repeat(6, 1))
    assert alone.nbytes == 6 * text.cache.nbytes, "a control"


def test_short_turns_do_not_pile_spare_room_up():
    model = patched_tiny("retrieval", layers=1)
    text = Text.read(model, [400])
    for _ in range(20):
        text = text.fork()
        text.more(5)
    store = text.cache.layers[0].stores[0]
    assert len(store.segments) == 21
    slots = sum(segment.k.untyped_storage().nbytes() for segment in store.segments.values()) // (4 * 8 * 8)
    assert slots == 400 + 400 // 8 + 19 * 5 + 5 + SPARE


def test_a_rollback_to_less_than_half_lets_go_of_the_rest():
    text = Text.read(patched_tiny("retrieval"), [3000])
    some, few = text.fork(), text.fork()
    some.back(1000)
    few.back(2900)
    assert some.cache.nbytes == text.cache.nbytes, "shared"
    assert few.cache.nbytes * 30 < text.cache.nbytes
    assert max(some.more(3), few.more(3)) < 1e-6


def test_forks_may_be_dropped_in_any_order():
    model, empty = patched_tiny("retrieval"), live_bytes()
    text = Text.read(model, [500])
    fork = text.fork()
    held, again = text.cache.nbytes, fork.fork()
    del text
    assert live_bytes() - empty >= held
    assert again.more(3) < 1e-6
    del again
    assert fork.more(3) < 1e-6
    caches = [weakref.ref(fork.cache), weakref.ref(fork.cache.layers[0].stores[0])]
    assert live_bytes() - empty >= held
    del fork
    assert live_bytes() - empty < held / 10
    assert all(cache() is None for cache in caches)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), "save"])
@pytest.mark.parametrize("lengths", [[80], [80, 30]])
def test_copies_and_pickles_of_forks(change, lengths):
    text = Text.read(patched_tiny(), lengths)
    fork = text.fork()
    fork.more(4)
    fork.repeat(2)
    if change == "save":
        torch.save(fork.cache, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = change(fork.cache)
    assert other.nbytes == fork.cache.nbytes
    for cache in (other, other.fork(), fork.cache):
        again = Text(text.model, cache, fork.ids, fork.mask)
        assert again.more(1) < 1e-6
        assert again.more(9) < 1e-6


def test_reset_leaves_the_others_alone():
    text = Text.read(patched_tiny(), [80])
    fork = text.fork()
    text.cache.reset()
    assert text.cache.nbytes == 0
    assert fork.more(3) < 1e-6
    text.ids, text.mask = text.ids[:, :0], text.mask[:, :0]
    assert text.more(40) < 1e-6


def test_an_empty_cache_and_a_torn_one():
    model = patched_tiny()
    empty = LongCtxCache(model).fork()
    ids = torch.randint(3, 97, (1, 40))
    assert torch.equal(read(model, empty, ids), read(model, LongCtxCache(model), ids))
    empty.layers[0].seen -= 1
    with pytest.raises(CacheError, match="interrupted"):
        empty.fork()


def test_max_tokens_is_the_limit_of_a_fork_as_well():
    model = patched_tiny("retrieval", layers=1)
    text = Text.read(model, [100], max_tokens=120)
    fork = text.fork()
    fork.more(15)
    before = fork.cache.nbytes
    fork.more(5)
    assert fork.cache.nbytes == before
    assert fork.cache.layers[0].stores[0].segments["kept"].k.shape[2] == 20
    with pytest.raises(CacheError, match="max_tokens=120"):
        fork.more(1)


@pytest.mark.parametrize("lengths", [[400], [400, 290]])
def test_sparse_patterns_on_a_fork(lengths):
    model = tiny_model("llama", torch.float32, head_dim=16)
    pattern = {"pattern": "vertical_slash", "vertical": 1, "slash": 1}
    patch_model(model, config_for(model, prefill={"min_tokens": 256, "retrieval": pattern}))
    whole = Text.read(model, lengths)
    split = whole.fork()
    new = torch.randint(3, 97, (len(lengths), 150))
    mask = torch.cat([whole.mask, torch.ones_like(new)], 1)
    counted = report(model).sparse
    want = read(model, whole.cache, new, mask)
    got = read(model, split.cache, new, mask)
    assert report(model).sparse == counted + 2 * 3 * len(lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    dense = tiny_model("llama", torch.float32, head_dim=16)
    dense.load_state_dict(model.state_dict())
    patch_model(dense, config_for(dense))
    other = read(dense, LongCtxCache(dense), torch.cat([whole.ids, new], 1), mask)
    assert (other - want).abs().max() > 0.01, "a control: the pattern matters"


def test_a_fork_read_under_autocast_keeps_one_dtype():
    model = tiny_model("llama", torch.float32, head_dim=16)
    patch_model(model, config_for(model, "retrieval"))
    text = Text.read(model, [60])
    forks = [text.fork(), text.fork()]
    with torch.autocast("cpu", torch.bfloat16):
        forks[0].more(5)
    store = forks[0].cache.layers[0].stores[0]
    assert {segment.dtype for segment in store.segments.values()} == {torch.float32}
    assert forks[1].more(5) < 1e-3
    forks[0].more(1)


def test_a_fork_made_in_inference_mode_goes_on_outside():
    text = Text.read(patched_tiny(), [100])
    with torch.inference_mode():
        fork = text.fork()
        fork.more(3)
        again = fork.fork()
        again.repeat(2)
    for one in (fork, again, text):
        assert one.more(2) < 1e-6


def test_threads_fork_one_cache():
    model = patched_tiny()
    for _ in range(20):
        text = Text.read(model, [50])
        with ThreadPoolExecutor(8) as pool:
            forks = list(pool.map(lambda _, text=text: text.cache.fork(), range(8)))
        for fork in forks:
            assert sum(segment.length for segment in fork.layers[0].stores[0].segments.values()) == 50


# ---- rows that go on by texts of different lengths ----


def staggered(model, prompt: int, questions: list[int], answers: int = 12, **kwargs) -> tuple[float, LongCtxCache]:
    """Questions of these lengths over one prompt in one batch, then decoded; the largest error against each alone."""
    ids = torch.randint(3, 97, (1, prompt))
    cache = LongCtxCache(model, **kwargs)
    read(model, cache, ids)
    cache = cache.fork()
    cache.batch_repeat_interleave(len(questions))
    longest = max(questions)
    cache.stagger([longest - length for length in questions])
    texts = [torch.cat([ids, torch.randint(3, 97, (1, length + answers))], 1) for length in questions]
    width = prompt + longest + answers
    rows = torch.cat([torch.nn.functional.pad(text, (width - text.shape[1], 0)) for text in texts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(t), (width - t.shape[1], 0)) for t in texts])
    worst, at = 0.0, prompt
    for step in (longest, *[1] * (answers // 2), 3, *[1] * (answers - answers // 2 - 3)):
        got = read(model, cache, rows[:, at : at + step], mask[:, : at + step])
        at += step
        for row, text in enumerate(texts if step > 1 or at == width else texts[:1]):
            end = text.shape[1] - (width - at)
            want = read(model, LongCtxCache(model), text[:, :end])
            worst = max(worst, (got[row] - want).abs().max().item())
    return worst, cache


@pytest.mark.spanning
@pytest.mark.parametrize("prompt", [12, 40, 300, 700])
@pytest.mark.parametrize("roles", ["retrieval", "streaming", "mixed"])
def test_staggered_rows_equal_each_alone(prompt, roles):
    model = patched_tiny(roles, recent=24)
    assert staggered(model, prompt, [9, 3, 1, 9])[0] < 1e-6
    assert staggered(model, prompt, [4, 4])[0] < 1e-6
    if prompt > 250:
        assert staggered(model, prompt, [201, 1, 100], max_tokens=1000)[0] < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_staggered_rows_of_every_family_and_window(family):
    model = tiny_model(family, torch.float64, sliding=13 if family in SLIDING else None)
    patch_model(model, config_for(model, "by layer"))
    assert staggered(model, 90, [30, 2, 17])[0] < 1e-6


@pytest.mark.parametrize("kernel", ["reference", "cpu", "native", "stock"])
def test_staggered_rows_on_every_kernel(kernel):
    dtype, limit = (torch.float32, 1e-3) if kernel == "native" else (torch.float64, 1e-6)
    model = tiny_model("llama", dtype, head_dim=16)
    patch_model(model, config_for(model, kernel=kernel))
    assert staggered(model, 90, [30, 2, 17])[0] < limit


@pytest.mark.parametrize("broken", ["bias", "alone", "history"])
def test_a_wrong_stagger_is_noticed(broken, monkeypatch):
    from hf_longctx.layout.rows import Rows
    from hf_longctx.layout.segments import HeadKV
    from hf_longctx.stores import full
    from hf_longctx.stores.sink_recent import SinkRecentStore

    if broken == "bias":
        right = Rows.tail_bias
        monkeypatch.setattr(Rows, "tail_bias", lambda *args: torch.zeros_like(right(*args)))
    elif broken == "alone":
        monkeypatch.setattr(full.Staggered, "alone", HeadKV.alone)
    else:
        monkeypatch.setattr(SinkRecentStore, "stagger", lambda *args: None)
    assert staggered(patched_tiny(recent=24), 300, [9, 3, 1])[0] > 1e-3, "a control"


def test_staggered_rows_share_the_prompt_and_go_on_as_other_caches():
    model = patched_tiny(recent=24)
    prompt = Text.read(model, [300])
    fork = prompt.cache.fork()
    held = {tensor.untyped_storage().data_ptr() for layer in prompt.cache.layers for tensor in layer.tensors()}
    fork.batch_repeat_interleave(3)
    fork.stagger([0, 5, 2])
    shared = [t for layer in fork.layers for t in layer.stores[0].tensors() if t.untyped_storage().data_ptr() in held]
    assert len(shared) == 2 * 3, "k and v of every layer's retrieval heads"
    tail = torch.stack([prompt.ids[0], *(torch.cat([torch.zeros(n).long(), prompt.ids[0, :-n]]) for n in (5, 2))])
    mask = torch.ones_like(tail)
    mask[1, :5], mask[2, :2] = 0, 0
    text = Text(model, fork, tail, mask)
    assert text.more(7) < 1e-6
    again = text.fork()
    assert text.more(1) < 1e-6
    again.rows([2, 1, 1], "reorder")
    assert again.more(1) < 1e-6
    again.back(4)
    assert again.more(3) < 1e-6
    again.back(20)  # into the prompt
    assert again.more(3) < 1e-6
    one = Text(model, copy.deepcopy(again.cache), again.ids, again.mask)
    one.rows([1], "select")
    assert one.more(2) < 1e-6
    one.repeat(2)
    assert max(one.more(1), one.more(9)) < 1e-6
    again.cache.reset()
    again.ids, again.mask = again.ids[:, :0], again.mask[:, :0]
    assert again.more(5) < 1e-6


def test_device_reads_of_staggered_rows_do_not_grow_with_the_layers():
    counts = []
    for layers in (2, 6):
        text = Text.read(patched_tiny(layers=layers), [60])
        text.repeat(2)
        text.cache.stagger([0, 3])
        mask = torch.ones(2, 64, dtype=torch.long)
        mask[1, :3] = 0
        for step in (3, 1):
            with CountReads() as count:
                read(text.model, text.cache, torch.full((2, step), 5), mask[:, : text.cache.seen + step])
            counts.append(count.reads)
    assert counts[:2] == counts[2:]


def test_rows_that_cannot_go_back_are_refused():
    model = patched_tiny()
    cases = []
    for lengths, pads in (([700], [1, 2]), ([700], [-1]), ([700], [SLACK + 1]), ([20], [20]), ([30, 20], [1, 2])):
        text = Text.read(model, lengths)
        with pytest.raises(CacheError, match="cannot stagger"):
            text.cache.stagger(pads)
        assert text.more(3) < 1e-6, "nothing was changed"
        cases.append(text.cache.stagger_room)
    assert cases[:2] == [SLACK, SLACK]
    assert cases[3:] == [22, 0]
