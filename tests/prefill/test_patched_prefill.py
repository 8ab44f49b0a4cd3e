"""Patched models with a prefill pattern against a stock model with the mask of the loops, and when the pattern runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.slow_patterns import PatternMask
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import DynamicCache

from hf_longctx import LongCtxCache, UnsupportedModeError, observe, patch_model, patched, report
from hf_longctx.layout.reads import All, Causal
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.segments import Segment
from hf_longctx.model import layer_call, plans
from hf_longctx.model.family import find_family
from hf_longctx.prefill.base import select
from hf_longctx.prefill.vertical_slash import VerticalSlash
from hf_longctx.stores.full import FullStore

TIGHT = {"pattern": "vertical_slash", "vertical": 3, "slash": 2}
SMALL = (3, 2)
SLOW = "sparse prefill: ran by its slow definition"


def settings(model, roles="mixed", retrieval=TIGHT, min_tokens=0, **more):
    kernel = more.pop("kernel", "auto")
    prefill = {"min_tokens": min_tokens, "retrieval": retrieval, **more}
    return config_for(model, roles, prefill=prefill, kernel=kernel)


def same_budget(layer, heads):
    return [SMALL] * heads


def with_mask(model, config, run, budgets=same_budget, **rule):
    """What ``run`` gives on the stock model with the mask of the loops, and how many (row, layer) ran it."""
    shadow = PatternMask(model, config, budgets, **rule)
    with shadow:
        out = run()
    return out, shadow.ran


GENERATE = {
    "one shot": {},
    "chunks": {"prefill_chunk_size": 140, "cache_implementation": "dynamic"},
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "user cache": {"past_key_values": DynamicCache},
}


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize(("family", "group"), [("llama", 1), ("qwen3", 4)])
def test_generate_equals_the_mask(family, group, mode):
    model = tiny_model(family, torch.float64, group=group, kv_heads=2, layers=2)
    config = settings(model)
    ids, asked = torch.randint(3, 97, (1, 290)), dict(GENERATE[mode])
    fresh = asked.pop("past_key_values", None)

    def run():
        torch.manual_seed(1)
        given = {} if fresh is None else {"past_key_values": fresh()}
        return model.generate(ids, max_new_tokens=3, **asked, **given)

    want, ran = with_mask(model, config, run)
    with patched(model, config):
        assert torch.equal(run(), want)
        found = report(model)
    assert ran == found.sparse > 0
    assert 0 < found.density < 1
    assert found.kernels == ("cpu",)
    assert not any(note.startswith(SLOW) for note in found.notes)


def logits_error(model, config, budgets=same_budget, dropped=None, **rule) -> float:
    """Largest difference of the logits of left-padded rows between the patched and the masked model, at real tokens."""
    ids, mask = left_padded([300, 131, 40])
    asked = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        want, ran = with_mask(model, config, lambda: model(**asked).logits, budgets, **rule)
        with patched(model, config):
            got = model(**asked).logits
            kept = model(input_ids=ids, attention_mask=mask).logits
            assert report(model).sparse == 2 * ran
    torch.testing.assert_close(kept[mask.bool()], got[mask.bool()], rtol=0, atol=1e-9)
    return (got - want)[mask.bool()].abs().max().item()


@pytest.mark.parametrize(("kv_heads", "group"), [(4, 1), (2, 4), (2, 7)])
def test_padded_logits_equal_the_mask(kv_heads, group):
    model = tiny_model("llama", torch.float64, kv_heads=kv_heads, group=group, layers=2)
    assert logits_error(model, settings(model)) <= 1e-6
    assert logits_error(model, settings(model), lambda layer, heads: [(9, 2)] * heads) > 1e-4, "a control"


def test_sharing_a_group_equals_the_union_of_masks():
    model = tiny_model("llama", torch.float64, kv_heads=2, group=4, layers=2)
    config = settings(model, share_groups=True)
    assert logits_error(model, config, share=True) <= 1e-6
    assert logits_error(model, config, share=False) > 1e-4, "a control"


@torch.no_grad()
def test_the_report_says_what_sharing_costs(monkeypatch):
    model = tiny_model("llama", torch.float64, kv_heads=2, group=4, layers=1)
    ids, mask = left_padded([300, 200])
    lists = []
    monkeypatch.setattr(layer_call, "select", lambda *args: lists.append(select(*args)) or lists[-1])
    asked = {"input_ids": ids, "attention_mask": mask}
    with patched(model, settings(model, "retrieval")):
        model(**asked)
        alone = report(model)
        assert alone.own_density == alone.density and "its own list" not in str(alone)
    with patched(model, settings(model, "retrieval", share_groups=True)):
        model(**asked)
        shared = report(model)
    union = [own.share_groups(4) for own in lists[2:]]
    assert shared.density == sum(int(one.reads) for one in union) / sum(one.causal for one in union)
    assert shared.own_density == alone.density < shared.density
    said = f"reading {shared.density:.1%} of the causal blocks (each query head its own list: {alone.density:.1%})"
    assert said in str(shared)


def test_a_table_gives_every_query_head_its_own():
    model = tiny_model("llama", torch.float64, kv_heads=2, group=4, layers=2)
    budgets = [TIGHT, {**TIGHT, "vertical": 40}, {"pattern": "dense"}]
    pairs = [SMALL, (40, 2), None]
    table = {"budgets": budgets, "map": [[0, 1, 2, 0, 1, 1, 2, 0], [2, 2, 2, 2, 0, 1, 0, 1]]}
    config = settings(model, "mixed", {"table": "mine"}, tables={"mine": table})
    assert logits_error(model, config, lambda layer, heads: [pairs[i] for i in table["map"][layer]]) <= 1e-6
    swapped = [row[::-1] for row in table["map"]]
    assert logits_error(model, config, lambda layer, heads: [pairs[i] for i in swapped[layer]]) > 1e-4, "a control"


def test_a_dropped_block_is_seen(monkeypatch):
    model = tiny_model("llama", torch.float64, kv_heads=2, layers=2)
    made = VerticalSlash.select.__func__

    def drop(cls, heads, q, k, scale):
        lists = made(cls, heads, q, k, scale)
        lists.indices[:, 0, -1, 0] = lists.indices[:, 0, -1, 1]
        return lists

    monkeypatch.setattr(VerticalSlash, "select", classmethod(drop))
    assert logits_error(model, settings(model)) > 1e-4


def test_rows_alone_equal_the_padded_batch_and_right_padding():
    model = tiny_model("llama", torch.float64, layers=2)
    patch_model(model, settings(model))
    ids, mask = left_padded([300, 200, 127])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        right_ids = torch.stack([row.roll(int(m.sum())) for row, m in zip(ids, mask, strict=True)])
        right = model(right_ids, attention_mask=mask.flip(1), use_cache=False).logits
        for row, length in enumerate([300, 200, 127]):
            alone = model(ids[row : row + 1, -length:], use_cache=False).logits[0]
            torch.testing.assert_close(left[row, -length:], alone, rtol=0, atol=1e-9)
            torch.testing.assert_close(right[row, :length], alone, rtol=0, atol=1e-9)
    found = report(model)
    assert (found.sparse, found.dense) == (2 * 6, 2 * 3)


@pytest.mark.parametrize(
    ("lengths", "min_tokens", "sparse"),
    [
        ([127], 0, [0]),
        ([128], 0, [1]),
        ([199], 200, [0]),
        ([200], 200, [1]),
        ([100, 128], 200, [0, 1]),  # tokens seen earlier count for min_tokens
        ([150, 127], 0, [1, 0]),  # but not for the 128 that a forward must bring
    ],
)
@torch.no_grad()
def test_the_prefill_rule_on_both_sides(lengths, min_tokens, sparse):
    model = tiny_model("llama", torch.float64, layers=2)
    patch_model(model, settings(model, "retrieval", min_tokens=min_tokens))
    dense = tiny_model("llama", torch.float64, layers=2)
    dense.load_state_dict(model.state_dict())
    for fresh in (lambda: LongCtxCache(model), DynamicCache):
        ours, theirs = fresh(), DynamicCache()
        before, done = report(model), 0
        for length, ran in zip(lengths, sparse, strict=True):
            ids, was = torch.randint(3, 97, (1, length)), report(model)
            error = model(ids, past_key_values=ours).logits - dense(ids, past_key_values=theirs).logits
            now, done = report(model), done + length
            assert (now.sparse - was.sparse, now.dense - was.dense) == ((2, 0) if ran else (0, 2))
            if ran and done >= 200:  # fewer tokens are sinks and local blocks, all read
                assert error.abs().max() > 1e-4
            elif done < 200:
                assert error.abs().max() <= 1e-6
        model(ids[:, :1], past_key_values=ours)
        after = report(model)
        assert after.sparse + after.dense - before.sparse - before.dense == 2 * len(lengths)


@torch.no_grad()
def test_budgets_of_everything_give_dense_logits():
    model = tiny_model("llama", torch.float64, layers=2)
    ids, mask = left_padded([300, 150])
    with patched(model, settings(model, "retrieval", {"pattern": "dense"})):
        want = model(ids, attention_mask=mask).logits
        assert (report(model).sparse, report(model).dense, report(model).density) == (0, 0, None)
    with patched(model, settings(model, "retrieval", {"pattern": "vertical_slash"})):
        got = model(ids, attention_mask=mask).logits
        assert (report(model).sparse, report(model).density) == (4, 1.0)
        assert "4 times sparse, reading 100.0% of the causal blocks" in str(report(model))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_gradients_equal_the_mask(train):
    model = tiny_model("llama", torch.float64, kv_heads=2, layers=2).train(train)
    config = settings(model)
    ids, mask = left_padded([200, 140])
    asked = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}

    def gradients():
        model.zero_grad()
        model(**asked).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want, ran = with_mask(model, config, gradients)
    with patched(model, config):
        got = gradients()
        found = report(model)
    assert ran == 4
    assert "reference" in found.kernels
    assert any(note.startswith(SLOW) and note.endswith("with gradients") for note in found.notes)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert max(g.abs().max() for g in want) > 1e-4


def test_a_gradient_of_values_alone_is_right():
    """The first layer's queries need none, so they alone do not tell that the call must be differentiable."""
    model = tiny_model("llama", torch.float64, layers=1)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
    config, ids = settings(model, "retrieval"), torch.randint(3, 97, (1, 200))

    def gradient():
        weight.grad = None
        model(ids, labels=ids, use_cache=False).loss.backward()
        return weight.grad.clone()

    want, ran = with_mask(model, config, gradient)
    with patched(model, config):
        torch.testing.assert_close(gradient(), want, rtol=0, atol=1e-9)
    assert ran == 1
    assert want.abs().max() > 1e-4


def test_kernel_cpu_says_what_to_do_with_gradients():
    model = tiny_model("llama", torch.float64, layers=2)
    ids = torch.randint(3, 97, (1, 200))
    patch_model(model, settings(model, kernel="cpu"))
    with pytest.raises(UnsupportedModeError, match=r"no_grad\(\).*Use kernel: auto or one of: reference"):
        model(ids)
    with torch.no_grad():
        got = model(ids).logits
    assert report(model).kernels == ("cpu",)
    assert not report(model).notes
    patch_model(model, settings(model, kernel="reference"))
    torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-9)


def test_lookup_steps_are_dense():
    model = tiny_model("llama", torch.float64, layers=2)
    ids = torch.randint(3, 97, (1, 100)).repeat(1, 2)
    with patched(model, settings(model)):
        want = model.generate(ids, max_new_tokens=8)
        before = report(model)
    with patched(model, settings(model)):
        model.generation_config.eos_token_id = -1
        got = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=4)
        assert report(model).sparse == before.sparse == 2
        assert report(model).dense >= before.dense == 0
    assert torch.equal(got, want)


def test_the_stock_kernel_does_not_bypass_the_pattern():
    model = tiny_model("llama", torch.float64, layers=2)
    config = settings(model, "retrieval", kernel="stock")
    ids = torch.randint(3, 97, (2, 200))
    want, ran = with_mask(model, config, lambda: model.generate(ids, max_new_tokens=3))
    with patched(model, config):
        assert torch.equal(model.generate(ids, max_new_tokens=3), want)
        assert report(model).kernels == ("cpu", "stock")
        assert report(model).sparse == ran == 4


@torch.no_grad()
def test_the_stock_kernel_with_right_padding():
    """A long row runs its pattern, whatever the rows before it are."""
    model = tiny_model("llama", torch.float64, layers=2)
    ids, mask = (t.flip(1) for t in left_padded([100, 300]))
    with patched(model, settings(model, "retrieval", kernel="stock")):
        got = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[1:], use_cache=False).logits
        assert (report(model).sparse, report(model).dense) == (4, 2)
        model(ids[:, :100], use_cache=False)
        assert (report(model).sparse, report(model).dense) == (4, 6)
        assert "stock" in report(model).kernels
    torch.testing.assert_close(got[1:], alone, rtol=0, atol=1e-9)


def test_a_kernel_without_block_lists_is_refused_at_patch_time(monkeypatch):
    model = tiny_model("llama")
    own = model.config
    monkeypatch.setattr("hf_longctx.kernels.cpu.READS", frozenset({All, Causal}))
    with pytest.raises(UnsupportedModeError, match=r"BlockList, which kernel 'cpu' does not.*one of:.*reference"):
        patch_model(model, settings(model, kernel="cpu"))
    assert model.config is own
    patch_model(model, settings(model, retrieval={"pattern": "dense"}, kernel="cpu"))
    patch_model(model, settings(model, kernel="reference"))
    model(torch.randint(3, 97, (1, 130)))
    assert report(model).kernels == ("reference",)
    assert not report(model).notes


def test_plans_hold_the_patterns_of_retrieval_heads_only(monkeypatch):
    model = tiny_model("qwen2", layers=2, sliding=13)
    budgets = [{**TIGHT, "vertical": 1 + i} for i in range(8)]
    table = {"budgets": budgets, "map": [list(range(8))] * 2}
    config = settings(model, ["RSRS", "RRRR"], {"table": "mine"}, tables={"mine": table})
    patch_model(model, config)
    first, window = model.base_model.longctx_state.plans
    assert [spec.vertical for spec in first.roles[0].prefill.patterns] == [1, 2, 5, 6]
    assert window.window and all(role.prefill is None for role in window.roles)
    for rank, want in enumerate(([1, 2], [5, 6])):
        monkeypatch.setattr(plans, "tensor_parallel", lambda *args, rank=rank: (rank, 2))
        plan = plans.make_plan(model.base_model.layers[0].self_attn, config, find_family("qwen2"), model.config)
        assert plan.letters == "RS"
        assert [spec.vertical for spec in plan.roles[0].prefill.patterns] == want
    everything = {"budgets": [{"pattern": "dense"}, TIGHT], "map": [[0, 0, 1, 1, 0, 0, 1, 1]] * 2}
    monkeypatch.undo()
    patch_model(model, settings(model, ["RSRS", "RSRS"], {"table": "mine"}, tables={"mine": everything}))
    assert model.base_model.longctx_state.plans[0].roles[0].prefill is None


@torch.no_grad()
def test_a_patched_model_and_its_cache_are_copied_and_continued():
    model = tiny_model("llama", torch.float64, layers=2)
    patch_model(model, settings(model))
    ids = torch.randint(3, 97, (1, 301))
    cache = LongCtxCache(model)
    model(ids[:, :300], past_key_values=cache)
    want = model(ids[:, 300:], past_key_values=copy.deepcopy(cache)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report(twin).sparse == report(model).sparse
        kept = pickle.loads(pickle.dumps(cache))
        assert torch.equal(twin(ids[:, 300:], past_key_values=kept).logits, want)


@torch.no_grad()
def test_observers_compute_without_the_pattern():
    model = tiny_model("llama", torch.float64, layers=2)
    ids = torch.randint(3, 97, (1, 200))
    with patched(model, config_for(model, "retrieval")):
        want = model(ids, use_cache=False).logits
    patch_model(model, settings(model, "retrieval"))
    with observe(model, lambda *args: args[-1]("retrieval")):
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=0, atol=1e-6)
    assert report(model).sparse == 0
    with observe(model, lambda *args: None):
        model(ids, use_cache=False)
    assert report(model).sparse == 2


def change_segments(monkeypatch, change) -> None:
    """What a full store gives its retrieval heads, changed."""
    append = FullStore.append

    def changed(self, k, v, rows):
        heads = append(self, k, v, rows)
        heads.segments = change(heads.segments[0])
        return heads

    monkeypatch.setattr(FullStore, "append", changed)


@torch.no_grad()
def test_keys_in_several_segments(monkeypatch):
    model = tiny_model("llama", torch.float64, layers=2)
    patch_model(model, settings(model, "retrieval"))
    ids, mask = left_padded([300, 190])
    want = model(ids, attention_mask=mask).logits[mask.bool()]

    def cut(whole):
        k, v = whole.contents()
        return [Segment(k[:, :, :120], v[:, :, :120], 120), Segment(k[:, :, 120:], v[:, :, 120:], k.shape[2] - 120)]

    change_segments(monkeypatch, cut)
    assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], want)
    assert report(model).sparse == 8


@torch.no_grad()
def test_keys_with_a_bias_are_refused(monkeypatch):
    model = tiny_model("llama", layers=1)
    patch_model(model, settings(model, "retrieval"))
    change_segments(monkeypatch, lambda whole: [Segment(whole.k, whole.v, whole.length, torch.zeros(1))])
    with pytest.raises(UnsupportedModeError, match="score bias"):
        model(torch.randint(3, 97, (1, 130)))


def test_real_tokens_of_rows():
    rows = Rows(3, 10, 20, starts=(0, 15, 30), ends=(25, 30, 30))
    assert [rows.real(row) for row in range(3)] == [(15, 25), (15, 15), (0, 0)]
    assert Rows(2, 10, 20).real(1) == (20, 30)
    assert list(Rows(2, 0, 9, ends=(9, 4)).groups()) == [(slice(None), 0)]
    assert list(Rows(2, 0, 9, ends=(9, 4)).groups(by_end=True)) == [(slice(0, 1), 0), (slice(1, 2), 0)]
