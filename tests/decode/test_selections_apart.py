"""What a selection keeps beside a cache: its memory, its choices, and sequences of one batch that stand apart."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from helpers.select_cases import SMALL, go_on, index_memory, prompted, selecting, selections
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import DynamicCache

from hf_longctx import LongCtxCache, UnsupportedModeError, patch_model, register, report
from hf_longctx.decode._growing import SPARE, Growing, room
from hf_longctx.decode._selection import TAKEN_BACK
from hf_longctx.decode.page_bounds import PageBounds
from hf_longctx.layout.segments import Segment
from hf_longctx.stores.base import SLACK
from hf_longctx.stores.full import Full, FullStore
from hf_longctx.stores.sink_recent import SinkRecent


def pages(**fields) -> PageBounds:
    return PageBounds(**{**SMALL, "page": 4, "budget": 8, **fields})


def tokens(count, batch=1):
    return torch.randint(3, 97, (batch, count))


def same(got, want, atol=1e-9):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def several(model, cache, ids, mask):
    """Logits of new tokens in one forward, at their positions in each sequence."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def test_a_sequence_whose_prompt_begins_beside_decoded_tokens_reads_it_by_the_store_s_rule():
    model = selecting(pages(), roles="retrieval")
    ids, mask = left_padded([190, 60])
    cache = LongCtxCache(model)
    several(model, cache, ids[:, :130], mask[:, :130])
    got = several(model, cache, ids[:, 130:], mask)
    same(got[1], go_on(model, LongCtxCache(model), ids[1:, -60:], step=60)[0], 1e-5)
    cache = prompted(model, ids[:1, :130])
    same(got[0], go_on(model, cache, ids[:1, 130:])[0])


def test_sequences_of_pads_alone_and_short_ones_beside_long_ones():
    model = selecting(pages(min_tokens=50), roles="retrieval")
    ids, mask = left_padded([60, 30, 1])
    mask[2] = 0
    steps = tokens(5, 3)
    mask = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], 1)
    mask[2, :-2] = 0
    for step in (1, 5):
        cache = LongCtxCache(model)
        several(model, cache, ids, mask[:, :60])
        got = torch.cat(
            [several(model, cache, new, mask[:, : 60 + (i + 1) * step]) for i, new in enumerate(steps.split(step, 1))],
            1,
        )
        for row, length in ((0, 60), (1, 30)):
            same(got[row], go_on(model, prompted(model, ids[row : row + 1, -length:]), steps[row : row + 1])[0], 1e-5)
        assert got.isfinite().all()


@pytest.mark.parametrize("similar", [None, 0.5])
@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("pads", [2, 6])
def test_right_pads_of_one_sequence_are_not_the_other_s(pads, short, similar):
    model = selecting(pages(refresh=4, similar=similar), roles="retrieval")
    ids, first, new = tokens(60, 2), tokens(3, 2), tokens(6, 2)
    cache = prompted(model, ids)
    go_on(model, cache, first)
    mask = torch.ones(2, 69, dtype=torch.long)
    mask[short, -pads:] = 0
    got = several(model, cache, new, mask)
    for row in range(2):
        alone = prompted(model, ids[row : row + 1])
        go_on(model, alone, first[row : row + 1])
        real = 6 - pads * (row == short)
        same(got[row, :real], go_on(model, alone, new[row : row + 1])[0, :real])


@pytest.mark.parametrize("back", [30, 255])
@pytest.mark.parametrize("fields", [{"refresh": 20}, {"refresh": 64, "similar": 0.4}])
def test_what_is_taken_back_is_as_if_it_had_never_been(fields, back):
    assert TAKEN_BACK > SLACK, "so much can always be taken back"
    model = selecting(pages(**fields), roles="retrieval", layers=1)
    ids, steps, others = tokens(60), tokens(280), tokens(9)
    cache = prompted(model, ids)
    go_on(model, cache, steps)
    cache.crop(-back)
    other = prompted(model, ids)
    go_on(model, other, steps[:, : 280 - back])
    same(go_on(model, cache, others), go_on(model, other, others))
    kept = [one.position for part in selections(cache)[0].parts.values() for one in part.choices]
    assert kept == sorted(kept) and len(kept) <= TAKEN_BACK + 1


def test_index_memory_is_reserved_and_given_back():
    model = selecting(pages(page=1), roles="retrieval")
    cache = prompted(model, tokens(60), max_tokens=250)
    places = set()
    for _ in range(150):
        go_on(model, cache, tokens(1))
        places.add(tuple(index_memory(cache)))
    assert len(places) == 1
    for fork in (False, True):
        cache = prompted(model, tokens(1500))
        go_on(model, cache, tokens(1))
        cache = cache.fork() if fork else cache
        before = sum(index_memory(cache).values())
        cache.crop(60)
        go_on(model, cache, tokens(1))
        assert sum(index_memory(cache).values()) < before / 10


def test_many_forks_of_padded_beams_stay_few_parts():
    model = selecting(pages(page=1), roles="retrieval", layers=1)
    ids, mask = left_padded([60, 50])
    mask = torch.cat([mask, torch.ones(2, 60, dtype=mask.dtype)], 1).repeat_interleave(2, 0)
    cache = prompted(model, ids, mask[::2, :60])
    cache.batch_repeat_interleave(2)
    for _ in range(60):
        go_on(model, cache, tokens(1, 4), mask)
        cache.reorder_cache(torch.tensor([0, 0, 3, 2]))
    (selection,) = selections(cache)
    for part in selection.parts.values():
        assert len(part.index.pages.shared) <= 5
        assert sum(x.nbytes for x in part.index.pages.tensors()) < 2.5 * sum(x.nbytes for x in part.index.pages.views())


def test_threads_may_fork_one_cache():
    model = selecting(pages(page=1), roles="retrieval", layers=1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            cache = prompted(model, tokens(90))
            go_on(model, cache, tokens(1))
            with ThreadPoolExecutor(4) as pool:
                forks = [one.result() for one in [pool.submit(cache.fork) for _ in range(8)]]
            for one in (cache, *forks):
                (part,) = (part.index.pages for part in selections(one)[0].parts.values())
                assert sum(view.shape[2] for view in part.views()) == part.length
                assert sum(shared.shape[2] for shared in part.shared) == part.length
    finally:
        sys.setswitchinterval(interval)


def test_a_choice_keeps_no_graph_and_leaves_inference_mode():
    model = selecting(pages(similar=0.5, refresh=32))
    cache = LongCtxCache(model)
    with torch.inference_mode():
        for ids in (tokens(60), tokens(1)):
            model(ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([0]))
    for _ in range(3):
        model(tokens(1), past_key_values=cache)  # gradients are on
    kept = [tensor for one in selections(cache) for tensor in one.tensors()]
    assert kept and not any(tensor.requires_grad for tensor in kept)
    copy.deepcopy(cache)
    pickle.dumps(cache)


def test_a_choice_of_a_token_that_is_read_another_way_counts_once():
    """A layer's own call has no gradients: with some of queries alone it is found out after it has chosen."""
    model = selecting(pages(), dtype=torch.float32, head_dim=16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn.q_proj" in name)
    cache = prompted(model, tokens(60))
    for _ in range(3):
        model(tokens(1), past_key_values=cache)
    assert report(model).chosen == 2 * 3


def test_autocast_does_not_change_the_index():
    model = selecting(pages(), dtype=torch.float32, head_dim=16)
    ids, steps = tokens(60), tokens(4)
    cache = LongCtxCache(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        go_on(model, cache, ids, step=60)
        go_on(model, cache, steps[:, :2])
    assert go_on(model, cache, steps[:, 2:]).isfinite().all()
    held = {tensor.dtype for layer in cache.own for store in layer.stores for tensor in store.tensors()}
    assert {
        tensor.dtype for one in selections(cache) for part in one.parts.values() for tensor in part.index.tensors()
    } == held


def growing(*sizes) -> tuple[Growing, torch.Tensor]:
    made, parts = Growing(), []
    for size in sizes:
        parts.append(torch.randn(2, 3, size, 4))
        made.append(parts[-1])
    return made, torch.cat(parts, 2)


def entries(made: Growing) -> torch.Tensor:
    return torch.cat(made.views(), 2) if made.length else torch.zeros(2, 3, 0, 4)


def test_what_grows_is_in_order_and_a_fork_shares_what_there_is():
    made, want = growing(1, 5, 40, 3)
    assert made.length == 49 and torch.equal(entries(made), want)
    for low, high in ((0, 49), (0, 1), (3, 47), (48, 49), (7, 7)):
        assert torch.equal(torch.cat([*made.views(low, high), want[:, :, :0]], 2), want[:, :, low:high])
    other = made.fork()
    assert [x.data_ptr() for x in made.tensors()] == [x.data_ptr() for x in other.tensors()] and not made.own
    more = torch.randn(2, 3, 2, 4)
    made.append(more)
    other.append(-more)
    assert torch.equal(entries(made), torch.cat([want, more], 2))
    assert torch.equal(entries(other), torch.cat([want, -more], 2))
    third = made.fork()  # of so few new ones there is a copy
    assert len(third.shared) == 1 and third.own is not made.own and torch.equal(entries(third), entries(made))
    for one, left in ((made, 50), (other, 20), (third, 0)):
        before = entries(one)
        one.crop(left)
        assert one.length == left and torch.equal(entries(one), before[:, :, :left])
        one.append(more)
        assert torch.equal(entries(one), torch.cat([before[:, :, :left], more], 2))


def test_rows_of_what_grows():
    made, want = growing(40)
    made.fork()
    made.append(torch.ones(2, 3, 1, 4))
    want = torch.cat([want, torch.ones(2, 3, 1, 4)], 2)
    made.map_rows(lambda x: x[[1, 1, 0]])
    assert torch.equal(entries(made), want[[1, 1, 0]])
    one = Growing()
    one.append(torch.randn(1, 3, 40, 4))
    one.fork()
    place = one.shared[0].data_ptr()
    one.map_rows(lambda x: x.repeat_interleave(5, 0))
    one.map_rows(lambda x: x[[4, 0]])
    assert one.shared[0].shape[0] == 2 and one.shared[0].data_ptr() == place, "rows of one memory stay so"
    one.crop(30)
    assert one.shared[0].stride(0) == 0 and one.length == 30


def test_room_of_what_grows():
    made = Growing()
    made.append(torch.randn(1, 1, 5, 4), most=100)
    assert made.own.shape[2] == 100
    made, _ = growing(400)
    assert made.own.shape[2] == room(400) == 410
    made.crop(3)
    assert made.own.shape[2] <= 2 * (3 + SPARE)


@dataclass(frozen=True)
class Windowed(SinkRecent):
    """A window of retrieval heads."""

    roles = ("retrieval",)
    rule = "all"


def test_a_store_that_does_not_keep_every_token_is_refused_when_patched():
    register("store", "windowed", Windowed)
    model = tiny_model()
    for roles in ("retrieval", "mixed"):
        config = config_for(model, roles, stores={"retrieval": Windowed(4, 16)}, decode={"retrieval": pages()})
        with pytest.raises(UnsupportedModeError, match=r"'windowed'.*a decode selection chooses.*select: dense.*full"):
            patch_model(model, config)
        assert not hasattr(model.config, "longctx")


@dataclass(frozen=True)
class Biased(Full):
    """Every token, with a score bias."""

    def new(self, heads, max_tokens):
        return BiasedStore(self, heads, max_tokens)


class BiasedStore(FullStore):
    def append(self, k, v, rows):
        part = super().append(k, v, rows)
        part.segments = [Segment(*x.contents(), x.length, x.k.new_zeros(1, 1, 1, x.length)) for x in part.segments]
        return part

    def place(self, rows):
        return None


def test_keys_with_a_bias_of_their_own_are_refused():
    register("store", "biased", Biased)
    model = tiny_model()
    patch_model(model, config_for(model, "retrieval", stores={"retrieval": Biased()}, decode={"retrieval": pages()}))
    cache = prompted(model, tokens(60))
    with pytest.raises(UnsupportedModeError, match=r"score bias, among which a selection cannot choose.*select: dense"):
        go_on(model, cache, tokens(1))


def test_other_caches_and_none_are_refused_before_a_layer_writes():
    model = selecting(pages())
    cache = DynamicCache()
    model(tokens(60), past_key_values=cache)  # a prompt is read by the store's rule
    with pytest.raises(
        UnsupportedModeError, match=r"selects.*\(page_bounds\).*DynamicCache.*LongCtxCache\(model\).*dense"
    ):
        model(tokens(1), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [60, 60]
    with pytest.raises(UnsupportedModeError, match=r"use_cache=False.*Set use_cache=True.*dense"):
        model.generate(tokens(60), max_new_tokens=2, use_cache=False)
    model.generation_config.use_cache = False
    with pytest.raises(UnsupportedModeError, match="use_cache=False"):
        model.generate(tokens(60), max_new_tokens=2)
    model = selecting(pages(min_tokens=100))
    for _ in range(2):
        model(tokens(1), past_key_values=cache)  # so few are read densely, with any cache
    assert report(model).read is None


@pytest.mark.parametrize(
    "kernel", ["auto", "stock", "reference", "cpu", "native", pytest.param("flex", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fields", [{}, {"mass": 0.7, "vote": "softmax"}, {"sub": 2, "refresh": 3}])
def test_every_kernel_word_reads_the_same(kernel, fields):
    ids, mask = left_padded([60, 44])
    steps = tokens(6, 4)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], 1)
    outs = []
    for word in ("reference", kernel):
        model = selecting(pages(**fields), dtype=torch.float32, head_dim=16, kernel=word)
        forked = prompted(model, ids[:1])
        go_on(model, forked, steps[:1, :1])
        forked = forked.fork()
        forked.batch_repeat_interleave(4)
        outs.append([go_on(model, forked, steps), go_on(model, prompted(model, ids, mask[:, :60]), steps[:2], mask)])
        said = report(model)
        assert said.chosen + said.reused == 2 * (1 + 4 * 6 + 2 * 6)
    for got, want in zip(*outs, strict=True):
        same(got, want, 1e-3)
