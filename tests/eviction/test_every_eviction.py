"""What holds of evictions by every score that ends prompts by itself, by every kind of budget (DESIGN section 6)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.caches import live_bytes
from helpers.evicting import BY, evicting, keys_of_heads, read, some
from helpers.seen import CASES, WORDS, rule_of
from helpers.tiny import left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, UnsupportedModeError, report, unpatch_model
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.config.words import dump, load

PROMPT = [case for case in CASES if load("eviction", WORDS[case]).moment == "prompt"]
PAIRS = [(case, by) for case in PROMPT for by in BY if by in ("uniform", "layer") or not rule_of(case).alike]
ONE = {word: case for case, word in reversed(WORDS.items())}  # a case of each word
FIRST = [(case, by) for case, by in PAIRS if by in ("layer", "head") and ONE[WORDS[case]] == case]
LEFT = {  # what is done with evicted tokens, and how what is left is kept
    "drop": {},
    "merge": {"after": {"after": "merge", "similarity": 0.3}},
    "quantized": {"by": "uniform", "keep": {"store": "quantized", "bits": 8, "group": 16, "residual": 0}},
    "regular": {"every": 16},
}
every = pytest.mark.parametrize(
    ("case", "by"), [pytest.param(*pair, marks=[] if pair in FIRST else pytest.mark.slow) for pair in PAIRS]
)
some_of_them = pytest.mark.parametrize(("case", "by"), FIRST)
SHARE = {"share": 0.4}


def patched(case: str, by: str, budget=SHARE, **fields):
    torch.manual_seed(0)
    return evicting(rule=dump(rule_of(case), "score"), by=by, budget=budget, **fields)


def asked(model, ids, mask=None, new=6, **kwargs):
    """Logits ``[T, B, V]`` of the answer, and what generate gave."""
    told = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, **told)
    return torch.stack(out.logits), out


def close(got, want, atol=1e-5) -> bool:
    """generate gives logits in float32."""
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=atol)


def test_every_word_that_ends_prompts_is_here():
    assert {WORDS[case] for case in PROMPT} == {
        word for word in WORDS.values() if load("eviction", word).moment == "prompt"
    }
    assert {WORDS[case] for case, _ in FIRST} == {WORDS[case] for case in PROMPT} and len(FIRST) > 10


@pytest.mark.spanning("case", "by")
@every
def test_a_budget_of_everything_is_dense_and_a_smaller_one_is_not(case, by):
    ids = some(2, 70)
    model = patched(case, by, {"share": 1.0})
    whole, _ = asked(model, ids)
    few, _ = asked(patched(case, by), ids)
    assert close(whole, asked(unpatch_model(model), ids)[0]) and not close(few, whole, 1e-3)


@pytest.mark.spanning("case", "by")
@every
def test_a_padded_batch_equals_its_sequences_alone(case, by):
    model = patched(case, by)
    ids, mask = left_padded([70, 33, 9, 1])
    got, _ = asked(model, ids, mask)
    for row, own in enumerate(mask.bool()):
        alone, _ = asked(model, ids[row, own][None])
        assert close(got[:, row], alone[:, 0]), row
    assert not close(got[:, 0], asked(model, ids[:1, 5:])[0][:, 0], 1e-3), "a control"


@pytest.mark.spanning("case", "by")
@every
def test_a_prompt_in_chunks_is_the_prompt_in_one(case, by):
    model = patched(case, by)
    ids = some(2, 70)
    want, _ = asked(model, ids)
    for chunk in (69, 23):  # the last chunk has one token
        assert close(asked(model, ids, prefill_chunk_size=chunk)[0], want)


@pytest.mark.spanning("case", "by")
@some_of_them
@pytest.mark.parametrize("left", [name for name in LEFT if name != "regular"])
def test_drafts_change_nothing(case, by, left):
    model = patched(case, **{"by": by, **LEFT[left]})
    ids = some(1, 40).repeat(1, 2)
    want = asked(model, ids, new=20)[1].sequences
    torch.manual_seed(1)
    helper = tiny_model("llama", torch.float64, layers=1)
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": helper}):
        out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, **drafts)
        assert torch.equal(out, want)


@pytest.mark.spanning("case", "by")
@some_of_them
def test_beams_and_samples_of_a_batch_are_those_of_its_sequences(case, by):
    model = patched(case, by)
    ids, mask = left_padded([60, 40])
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3)
    for row, own in enumerate(mask.bool()):
        alone = model.generate(ids[row, own][None], max_new_tokens=5, num_beams=3)
        assert torch.equal(beams[row, -5:], alone[0, -5:])
    sampled = []
    for given in ({"num_return_sequences": 2}, {}):
        torch.manual_seed(3)
        batch = (x if given else x.repeat_interleave(2, 0) for x in (ids, mask))
        one, other = batch
        sampled.append(model.generate(one, attention_mask=other, max_new_tokens=5, do_sample=True, **given))
    assert torch.equal(*sampled)


@pytest.mark.spanning("case", "by")
@some_of_them
@pytest.mark.parametrize("left", LEFT)
def test_later_turns_by_generate_are_those_by_hand(case, by, left):
    model = patched(case, **{"by": by, **LEFT[left]})
    ids, mask = left_padded([60, 60 if left == "regular" else 37])
    cache, hand, past, got, want = LongCtxCache(model), LongCtxCache(model), 0, [], []
    for turn in range(2):
        logits, out = asked(model, ids, mask, 4, past_key_values=cache)
        mask = torch.cat([mask, mask.new_ones(2, 4)], 1)
        got.append(logits)
        for end in range(ids.shape[1], ids.shape[1] + 4):
            with torch.no_grad():
                positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, past:]
                step = {"attention_mask": mask[:, :end], "position_ids": positions, "past_key_values": hand}
                want.append(model(out.sequences[:, past:end], **step).logits[:, -1].float())
            past = end
        past = cache.seen
        hand.crop(past) if hand.seen > past else None
        ids = torch.cat([out.sequences, some(2, 130, seed=turn)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 130)], 1)
    assert cache.own[0].evicting[0].cut.slots == 194 and cache.nbytes == hand.nbytes
    assert close(torch.cat(got), torch.stack(want))


@pytest.mark.spanning("case", "by")
@some_of_them
@pytest.mark.parametrize("left", LEFT)
@torch.no_grad()
def test_caches_are_copied_forked_reordered_and_reset(case, by, left):
    model = patched(case, **{"by": by, **LEFT[left]})
    ids, mask = left_padded([60, 37, 5])
    for steps in (0, 2):  # before and after the eviction
        cache, own = LongCtxCache(model), mask
        model(ids, attention_mask=own, past_key_values=cache)
        for _ in range(steps):
            own = torch.cat([own, own.new_ones(3, 1)], 1)
            model(ids[:, :1], attention_mask=own, past_key_values=cache)

        def goes_on(cache, rows, own=own):
            found = []
            for at in range(4):
                seen = torch.cat([own[rows], own.new_ones(len(rows), at + 1)], 1)
                found.append(
                    model(ids[rows, at + 1 : at + 2], attention_mask=seen, past_key_values=cache).logits[:, -1]
                )
            return torch.stack(found)

        rows = torch.arange(3)
        held = storage_bytes(cache.tensors())
        forks = [cache.fork(), cache.fork()]
        if steps and left != "quantized":  # that one copies what it has packed
            together = storage_bytes(x for one in (cache, *forks) for x in one.tensors())
            assert together < held + 2 * 12 * 4096, "what is left is shared"
        copies = [forks[0].fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        want = goes_on(cache, rows)
        for other in copies:
            assert close(goes_on(other, rows), want, 1e-12)
        for change, order in (
            (lambda one: one.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
            (lambda one: one.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda one: one.batch_select_indices([1]), [1]),
        ):
            other = forks[0].fork()
            change(other)
            assert close(goes_on(other, torch.tensor(order)), want[:, order], 1e-12)
        cache.reset()
        assert (cache.nbytes, cache.seen, cache.reading) == (0, 0, False)


@pytest.mark.spanning("case", "by")
@every
@torch.no_grad()
def test_memory_is_what_the_budget_says_and_nothing_else_is_alive(case, by):
    model = patched(case, by)
    ids = some(2, 300)
    read(model, ids[0])  # what is made once
    before = live_bytes()
    cache = LongCtxCache(model)
    model(ids, past_key_values=cache)
    whole = live_bytes() - before
    cache.evict()
    for beside in (cache.token_ids, cache.surprisals):  # not of keys and values
        if beside is not None:
            beside.reset()
    assert 0 <= live_bytes() - before - cache.nbytes < 64 and cache.nbytes < 0.62 * whole
    per_token = 2 * 8 * 8
    kept = 2 * 3 * 4 * 120
    tokens = cache.nbytes - storage_bytes(
        x for layer in cache.own for one in layer.evicting for x in one.known.tensors()
    )
    store = cache.own[0].evicting[0]
    if store.ragged is None:
        assert kept * per_token < tokens <= kept * per_token * 1.2, "the spare room of a buffer that grows"
    else:
        assert tokens == kept * (per_token + 4) + 3 * 2 * 4 * 16, "positions, and where each head's tokens are"


@every
@torch.no_grad()
def test_budgets_add_up(case, by):
    model = patched(case, by, {"tokens": 40})
    cache = read(model, some(100))
    cache.evict()
    counts = [[len(k) for k in heads] for heads in keys_of_heads(cache)]
    by_layer = [sum(heads) for heads in counts]
    assert sum(by_layer) == 3 * 4 * 40
    assert by in ("layer", "model") or by_layer == [160] * 3
    assert by in ("head", "model") or all(len(set(heads)) == 1 for heads in counts)
    assert (by != "layer") or by_layer[0] > by_layer[1] > by_layer[2]
    assert min(min(heads) for heads in counts) >= 12, "sink and recent"


@pytest.mark.spanning("case", "by")
@some_of_them
@torch.no_grad()
def test_reserved_room_is_made_once(case, by):
    model = patched(case, by)
    ids = some(150)
    logits = []
    for most in (None, 150):
        cache = LongCtxCache(model, max_tokens=most)
        read(model, ids[:100], cache)
        read(model, ids[100:102], cache, chunk=1)
        held = {x.data_ptr() for x in cache.tensors()}
        logits.append([model(one[None, None], past_key_values=cache).logits for one in ids[102:]])
        assert ({x.data_ptr() for x in cache.tensors()} == held) == (most is not None)
    assert close(torch.cat(logits[1]), torch.cat(logits[0]))
    with pytest.raises(CacheError, match="max_tokens=150"):
        model(ids[None, :1], past_key_values=cache)


@some_of_them
def test_the_report_says_what_was_evicted_when(case, by):
    model = patched(case, by)
    asked(model, some(1, 100))
    found = report(model)
    assert (found.evictions, found.evicted_at) == (1, 100) and found.evicted == pytest.approx(0.6)
    assert "evicted       60.0% of the tokens of these heads, the last time after 100 tokens" in str(found)
    assert "evicted  " not in str(report(evicting(rule={"score": "key_norm"})))


@pytest.mark.spanning("case", "by")
@some_of_them
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_streaming_heads_beside_them_and_layers_with_windows_of_their_own(case, by, family):
    sliding = None if family == "llama" else 20
    torch.manual_seed(0)
    model = tiny_model(family, torch.float64, sliding=sliding)
    model = patched(case, by, roles="mixed", model=model)
    ids, mask = left_padded([70, 33])
    got, out = asked(model, ids, mask)
    for row, own in enumerate(mask.bool()):
        assert close(got[:, row], asked(model, ids[row, own][None])[0][:, 0]), row
    evicted = [layer.evicting for layer in out.past_key_values.own]
    assert any(evicted) == (family != "mistral") and all(stores or family != "llama" for stores in evicted)


@some_of_them
def test_a_sparse_pattern_before_and_a_selection_after(case, by):
    """RocketKV's two stages: a coarse eviction, then pages of what is left."""
    torch.manual_seed(0)
    pattern = {"min_tokens": 0, "retrieval": {"pattern": "vertical_slash", "vertical": 8, "slash": 8}}
    pages = {"retrieval": {"select": "page_bounds", "page": 8, "budget": 32, "sink": 4, "recent": 8, "min_tokens": 0}}
    pages["retrieval"]["dense_layers"] = 0
    model = patched(case, by, top={"prefill": pattern})
    ids, mask = left_padded([900, 700])
    sparse, _ = asked(model, ids, mask)
    assert report(model).sparse and not close(sparse, asked(patched(case, by), ids, mask)[0], 1e-3)
    if by == "head":
        with pytest.raises(UnsupportedModeError, match="heads keep different tokens in different numbers"):
            patched(case, by, top={"decode": pages})
        return
    model = patched(case, by, top={"decode": pages})
    got, _ = asked(model, ids, mask)
    assert report(model).read < 0.6 and not close(got, asked(patched(case, by), ids, mask)[0], 1e-3)
    model = patched(case, by, top={"decode": pages})
    for row, own in enumerate(mask.bool()):
        assert close(got[:, row], asked(model, ids[row, own][None])[0][:, 0]), row
    everything = {"retrieval": {**pages["retrieval"], "budget": 4096}}
    whole, _ = asked(patched(case, by, top={"decode": everything}), ids, mask)
    assert close(whole, asked(patched(case, by), ids, mask)[0])


@pytest.mark.slow
@pytest.mark.parametrize("by", BY)
@torch.no_grad()
def test_memory_is_flat_over_many_decoded_tokens(by):
    tokens = 20_000 if by == "head" else 2_000
    model = evicting(rule={"score": "snapkv", "window": 8}, by=by, budget={"tokens": 64}, every=64)
    cache = read(model, some(100))
    most = []
    for step in some(tokens).split(1):
        model(step[None], past_key_values=cache)
        most.append(cache.nbytes)
    assert cache.seen == tokens + 100 and max(most[200:]) == max(most[-200:]) < 3 * 2 * 8 * 8 * 12 * 128
