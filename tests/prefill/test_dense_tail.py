"""``prefill.streaming.dense_tail``: the last tokens of a prompt, against the rule as an explicit mask."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.tail_mask import TailMask, WatchTail
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import DynamicCache

import hf_longctx.model.attention
from hf_longctx import (
    CacheError,
    ConfigError,
    LongCtxCache,
    LongCtxConfig,
    PromptCache,
    observe,
    patch_model,
    patched,
    report,
)
from hf_longctx.config.words import load, words
from hf_longctx.layout.rows import Rows
from hf_longctx.prompts.prompt import Prompt
from hf_longctx.stores.sink_recent import SinkRecent

FIXED = {"store": "sink_recent", "sink": 4, "recent": 16}
MEANS = {"store": "sink_recent_compensated", "sink": 4, "recent": 16}
GROWING = {**MEANS, "recent": {"min": 9, "fraction": 0.3}}
TIGHT = {"pattern": "vertical_slash", "vertical": 3, "slash": 2}


def tailed(model, tail, roles="mixed", store=FIXED, retrieval="dense", **top) -> LongCtxConfig:
    retrieval = {"pattern": retrieval} if isinstance(retrieval, str) else retrieval
    prefill = {"min_tokens": 0, "retrieval": retrieval, "streaming": {"pattern": "sink_recent", "dense_tail": tail}}
    return config_for(model, roles, stores={"streaming": store}, prefill=prefill, **top)


def small(family="llama", dtype=torch.float64, **kwargs):
    return tiny_model(family, dtype, **{"kv_heads": 2, "layers": 2, **kwargs})


@pytest.fixture
def watch(monkeypatch):
    yield lambda config, **kwargs: WatchTail(monkeypatch, config, **kwargs)
    monkeypatch.undo()
    hf_longctx.model.attention.register()


@torch.no_grad()
def read_in(model, ids, mask, chunks, decoded=2):
    """Read with a cache in these chunks, then ``decoded`` tokens one by one; the last logits."""
    cache, done = LongCtxCache(model), 0
    for count in [*chunks, *[1] * decoded]:
        done += count
        out = model(ids[:, done - count : done], attention_mask=mask[:, :done], past_key_values=cache)
    assert done == ids.shape[1]
    return out.logits[:, -1]


# (tail, tokens of each sequence, chunks, store, what else)
CALLS = [(tail, [300], [300], FIXED, {}) for tail in (1, 63, 64, 65, 299, 300, 311)]
CALLS += [(64, [tokens], [tokens], FIXED, {"family": "qwen3", "group": 4}) for tokens in (127, 128, 129)]
CALLS += [(tail, [300], [130, 129, 41], FIXED, {"roles": "streaming"}) for tail in (1, 64, 129)]
CALLS += [
    (40, [400], [5, 128, 1, 266], {**FIXED, "sink": sink, "recent": recent}, {})
    for sink, recent in ((0, 16), (3, 1), (200, 7), (512, 300), (0, 1), (64, 500))
]
CALLS += [
    (50, lengths, chunks, FIXED, {"roles": "by layer"})
    for lengths, chunks in (([300, 129, 40], [300]), ([300, 129, 1], [140, 160]), ([300, 200, 128], [20, 270, 10]))
]
CALLS += [(50, [300], [300], FIXED, {"family": "qwen2", "layers": 3, "sliding": 13})]
CALLS += [
    (tail, [300], chunks, store, {})
    for store in (MEANS, GROWING, {**MEANS, "sink": 0})
    for tail, chunks in ((64, [300]), (40, [130, 1, 169]))
]
CALLS += [(50, [300, 150, 1], [140, 160], store, {"roles": "streaming"}) for store in (MEANS, {**GROWING, "sink": 160})]
CALLS += [(64, [300], [150, 150], FIXED, {"kernel": kernel}) for kernel in ("cpu", "reference", "stock")]
CALLS += [(64, [300], [150, 150], FIXED, {"retrieval": TIGHT, "roles": "streaming"})]


def error_of(watch, tail, lengths, chunks, store, more, told=None) -> float:
    torch.manual_seed(len(chunks) + tail)
    more = dict(more)
    asked = {name: more.pop(name) for name in ("roles", "kernel", "retrieval") if name in more}
    model = small(**more)
    config = tailed(model, tail, store=store, **asked)
    watched = watch(config, tail=told)
    ids, mask = left_padded([length + 2 for length in lengths])
    read_in(patch_model(model, config), ids, mask, chunks)
    assert watched.calls == model.config.num_hidden_layers * (len(chunks) + 2)
    return watched.error


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_every_call_reads_by_the_rule(case, watch):
    assert error_of(watch, *case) <= 1e-12


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("case", [CALLS[2], CALLS[11], next(case for case in CALLS if case[3] is GROWING)], ids=str)
def test_a_tail_of_one_token_more_or_less_is_seen(case, off, watch):
    assert error_of(watch, *case, told=case[0] + off) > 1e-4


@torch.no_grad()
def test_the_compiled_kernel_reads_the_same():
    """It takes float32 alone."""
    model = small(dtype=torch.float32, head_dim=16)
    ids, mask = left_padded([300, 130])
    found = {}
    for kernel in ("reference", "native"):
        with patched(model, tailed(model, 50, kernel=kernel)):
            if kernel == "native" and not has_compiler():
                pytest.skip("no compiler")
            found[kernel] = read_in(model, ids, mask, [140, 158])
    torch.testing.assert_close(found["native"], found["reference"], rtol=0, atol=1e-3)


def has_compiler() -> bool:
    from hf_longctx.kernels import native

    return native._load()[0] is not None


@torch.no_grad()
def test_right_padding_ends_the_tail_at_the_last_real_token():
    model = small()
    ids, mask = (t.flip(1) for t in left_padded([300, 140, 100]))
    patch_model(model, tailed(model, 50, retrieval=TIGHT))
    for more in ({"use_cache": False}, {}):
        got = model(ids, attention_mask=mask, **more).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model(ids[row : row + 1, :length], use_cache=False).logits
            torch.testing.assert_close(got[row, :length], alone[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_padded_sequence_equals_itself_alone():
    model = small()
    patch_model(model, tailed(model, 50))
    ids, mask = left_padded([300, 200, 128])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, length in enumerate((300, 200, 128)):
        alone = model(ids[row : row + 1, -length:]).logits[0, -1]
        torch.testing.assert_close(got[row], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("store", [FIXED, MEANS], ids=["sinks and window", "and a mean"])
@torch.no_grad()
def test_every_cache_gives_the_same(store):
    """In chunks too: another cache has more tokens, and the tail reads those that a LongCtxCache still has."""
    model = small()
    patch_model(model, tailed(model, 50, store=store))
    ids, mask = left_padded([400, 290])
    want, got = LongCtxCache(model), DynamicCache()
    for low, high in ((0, 150), (150, 290), (290, 400)):
        now = {"input_ids": ids[:, low:high], "attention_mask": mask[:, :high]}
        kept, other = (model(**now, past_key_values=cache).logits for cache in (want, got))
        torch.testing.assert_close(other[mask[:, low:high] > 0], kept[mask[:, low:high] > 0], rtol=0, atol=1e-9)


GENERATE = {
    "greedy": {},
    "chunks": {"prefill_chunk_size": 140, "cache_implementation": "dynamic"},
    "beams": {"num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "user cache": {"past_key_values": DynamicCache},
}


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_equals_the_mask(mode):
    """A tail longer than the prompt too: what evaluations do that read a prompt densely and mask what comes after."""
    model = small()
    ids, mask = left_padded([290, 200])

    def run():
        torch.manual_seed(1)
        asked = dict(GENERATE[mode])
        fresh = asked.pop("past_key_values", None)
        given = {} if fresh is None else {"past_key_values": fresh()}
        return model.generate(ids, attention_mask=mask, max_new_tokens=4, **asked, **given)

    for tail in (60, 1000):
        config = tailed(model, tail)
        with TailMask(model, config):
            want = run()
        with patched(model, config):
            assert torch.equal(run(), want)
            assert report(model).tails


@torch.no_grad()
def test_a_tail_as_long_as_the_prompt_is_dense_attention():
    model = small()
    ids = torch.randint(3, 97, (1, 300))
    want = model(ids).logits
    for tail in (300, 301):
        with patched(model, tailed(model, tail, "streaming")):
            torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-12)
    with patched(model, tailed(model, 250, "streaming")):
        assert (model(ids).logits - want).abs().max() > 1e-4, "a control"


@torch.no_grad()
def test_no_tail_is_what_it_was_bit_by_bit():
    model = small()
    ids, mask = left_padded([300, 140])
    without = config_for(model, "mixed")
    assert without.prefill.streaming.dense_tail == 0
    with patched(model, without):
        want = model(ids, attention_mask=mask).logits
        assert "dense tail" not in str(report(model))
    with patched(model, tailed(model, 0)):
        assert torch.equal(model(ids, attention_mask=mask).logits, want)


def test_gradients_equal_the_mask():
    model = small()
    config = tailed(model, 60)
    ids, mask = left_padded([200, 150])

    def gradient():
        model.zero_grad()
        model(ids, attention_mask=mask, use_cache=False).logits[:, -40:].square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    with TailMask(model, config):
        want = gradient()
    with TailMask(model, config, tail=61):
        assert (gradient() - want).abs().max() > 1e-9, "a control"
    with patched(model, config):
        torch.testing.assert_close(gradient(), want, rtol=0, atol=1e-9)


class Lengths:
    """Notes the new tokens of every forward of a model."""

    def __init__(self, model):
        self.noted = []
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.noted.append(kwargs["input_ids"].shape[1])


DRAFTS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "many drafts": {"prompt_lookup_num_tokens": 150},
    "an assistant": {"assistant_model": True},
    "sampled": {"prompt_lookup_num_tokens": 4, "do_sample": True, "top_k": 1},
}


@pytest.mark.spanning
@pytest.mark.parametrize("mode", DRAFTS)
@pytest.mark.parametrize("retrieval", ["dense", TIGHT], ids=["dense", "pattern"])
def test_drafts_are_no_end_of_a_prompt(mode, retrieval):
    """One token over and over is what lookup finds drafts in, and after which the model goes on alike."""
    model = small()
    ids = torch.randint(3, 97, (1, 40)).repeat(1, 8)
    asked = dict(DRAFTS[mode])
    if "assistant_model" in asked:
        asked["assistant_model"] = copy.deepcopy(model)
        asked["assistant_model"].generation_config.num_assistant_tokens_schedule = "constant"
    new = 160 if mode == "many drafts" else 30
    with patched(model, tailed(model, 64, retrieval=retrieval)):
        want = model.generate(ids, max_new_tokens=new)
        model.generation_config.eos_token_id = -1
        lengths = Lengths(model)
        assert torch.equal(model.generate(ids, max_new_tokens=new, **asked), want)
        lengths.hook.remove()
    prompt, *verified = lengths.noted
    assert prompt == 320
    assert 1 < max(verified) < 128


@torch.no_grad()
def test_drafts_stay_with_the_prompt_where_nothing_tells_them_apart():
    model = small()
    model.generation_config.eos_token_id = -1
    lengths = Lengths(model)
    with patched(model, tailed(model, 0)):
        model.generate(torch.randint(3, 97, (1, 40)).repeat(1, 8), max_new_tokens=4, prompt_lookup_num_tokens=4)
    assert lengths.noted[0] == 324


@torch.no_grad()
def test_short_forwards_read_as_decoded_tokens():
    """127 tokens at once, or one by one."""
    model = small()
    patch_model(model, tailed(model, 64, "streaming"))
    ids = torch.randint(3, 97, (1, 327))
    caches = [LongCtxCache(model) for _ in range(2)]
    for cache in caches:
        model(ids[:, :200], past_key_values=cache)
    at_once = model(ids[:, 200:], past_key_values=caches[0]).logits
    singly = torch.cat([model(ids[:, i : i + 1], past_key_values=caches[1]).logits for i in range(200, 327)], 1)
    torch.testing.assert_close(at_once, singly, rtol=0, atol=1e-9)


@torch.no_grad()
def test_nothing_more_is_kept():
    model = small()
    ids = torch.randint(3, 97, (1, 300))
    held = []
    for tail in (0, 64):
        with patched(model, tailed(model, tail)):
            cache = LongCtxCache(model)
            model(ids, past_key_values=cache)
            store = cache.own[0].stores[1]
            first = [part.k[:, :, : part.longest].clone() for part in store.filled(Rows(1, 300, 0)).values()]
            held.append((cache.nbytes, first))
    assert held[0][0] == held[1][0]
    assert all(torch.equal(a, b) for a, b in zip(held[0][1], held[1][1], strict=True)), "keys of the first layer"


@torch.no_grad()
def test_a_cache_of_another_tail():
    """It is refused while it lives, as one of other patterns is; a saved one goes on."""
    model = small()
    ids = torch.randint(3, 97, (1, 200))
    with patched(model, tailed(model, 64)):
        cache = LongCtxCache(model)
        model(ids, past_key_values=cache)
    with patched(model, tailed(model, 65)), pytest.raises(CacheError, match=r"other prefill\)"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_saved_cache_is_read_with_another_tail(tmp_path):
    model = small()
    ids = torch.randint(3, 97, (1, 200))
    with patched(model, tailed(model, 64)):
        cache = LongCtxCache(model)
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        want = model(ids[:, :1], past_key_values=cache).logits
    with patched(model, tailed(model, 0)):
        loaded = LongCtxCache.load(tmp_path / "cache", model)
        assert torch.equal(model(ids[:, :1], past_key_values=loaded).logits, want)


@torch.no_grad()
def test_the_report_counts_tails():
    model = small()
    ids, mask = left_padded([300, 100])
    with patched(model, tailed(model, 64)):
        assert "dense tail    the last 64 tokens of a prompt: 0 times, 0 tokens (rows x layers)" in str(report(model))
        cache = LongCtxCache(model)
        model(ids, attention_mask=mask, past_key_values=cache)
        found = report(model)
        assert (found.dense_tail, found.tails, found.tail_tokens) == (64, 2, 128)
        assert not found.notes
        model(ids[:, :127], attention_mask=torch.cat([mask, torch.ones(2, 127)], 1), past_key_values=cache)
        assert report(model).tails == 2 and not report(model).notes
        model(ids[:, :128], attention_mask=torch.cat([mask, torch.ones(2, 255)], 1), past_key_values=cache)
        assert (report(model).tails, report(model).tail_tokens) == (6, 384)
        assert any(
            note.startswith("dense tail: some prompts were read in several forwards") for note in report(model).notes
        )


@torch.no_grad()
def test_an_observer_computes_by_the_stores_alone():
    """Over both kinds of caches, where the model itself runs its tail."""
    model = small()
    ids = torch.randint(3, 97, (1, 200))
    patch_model(model, tailed(model, 0, "streaming"))
    want = model(ids).logits
    patch_model(model, tailed(model, 64, "streaming"))
    tail = model(ids).logits
    assert (tail - want).abs().max() > 1e-4, "a control"

    def by_store(layer, q, k, v, scaling, rows, compute):
        return compute("streaming")

    for cache in (None, LongCtxCache(model)):
        with observe(model, by_store):
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, want, rtol=0, atol=1e-9)
        with observe(model, lambda *shown: None):
            torch.testing.assert_close(model(ids).logits, tail, rtol=0, atol=1e-9)


@torch.no_grad()
def test_copies_of_a_patched_model_and_bfloat16():
    model = small()
    ids = torch.randint(3, 97, (1, 200))
    patch_model(model, tailed(model, 64))
    want = model(ids).logits
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one(ids).logits, want)
    low = small(dtype=torch.float32)
    low.load_state_dict(model.state_dict())
    patch_model(low, tailed(low, 64))
    with torch.autocast("cpu", torch.bfloat16):
        got = low(ids).logits
    assert got.isfinite().all() and report(low).tails == 2


@torch.no_grad()
def test_taking_back_and_forking_after_a_tail():
    model = small()
    patch_model(model, tailed(model, 64))
    ids = torch.randint(3, 97, (1, 310))
    cache = LongCtxCache(model)
    model(ids[:, :300], past_key_values=cache)
    fork = cache.fork()
    want = model(ids[:, 300:301], past_key_values=cache).logits
    model(ids[:, 301:], past_key_values=cache)
    cache.crop(300)
    for one in (cache, fork):
        assert torch.equal(model(ids[:, 300:301], past_key_values=one).logits, want)


def test_questions_over_one_prompt_are_answered_as_each_alone(monkeypatch):
    """Shorter ones than the batch's would read the end of the prompt again, and it would see less."""
    model = small()
    document = torch.randint(3, 97, (300,)).tolist()
    questions = [torch.randint(3, 97, (length,)).tolist() for length in (30, 9, 140, 30)]
    patch_model(model, tailed(model, 64))
    prompt = PromptCache(model).prefill(document)
    want = [prompt.ask([one], max_new_tokens=5)[0] for one in questions]
    before = report(model)
    assert prompt.ask(questions, max_new_tokens=5) == want
    assert report(model).forwards - before.forwards == 3 * 5, "the two of one length together"
    assert report(model).tails - before.tails == 2, "of the long question, in two layers"
    monkeypatch.setattr(Prompt, "_room", lambda self: self.cache.stagger_room)
    assert prompt.ask(questions, max_new_tokens=5) != want, "a control"


class Everywhere(SinkRecent):
    """Another rule than the one whose tail it inherits."""

    def reads(self, part, rows, group, start):
        return part.alone(group, start), None


def test_a_store_that_says_nothing_of_a_tail_is_refused(monkeypatch):
    able = [name for name in words("stores") if load("stores", name).has_tail_reads()]
    assert able == ["sink_recent", "sink_recent_compensated"]
    assert not Everywhere.has_tail_reads()
    model = small()
    monkeypatch.delattr(load("stores", "sink_recent_compensated"), "tail_reads")
    wanted = (
        r"prefill.streaming.dense_tail: got 5, but store 'sink_recent_compensated'.*What works: 0, or .*: sink_recent\."
    )
    with pytest.raises(ConfigError, match=wanted):
        tailed(model, 5, store=MEANS)
    assert tailed(model, 0, store=MEANS).prefill.streaming.dense_tail == 0


def test_an_override_sets_the_tail_alone():
    model = small()
    config = config_for(model).override(prefill={"streaming": {"dense_tail": 9}})
    assert config.prefill.streaming.dense_tail == 9
    assert config.override(prefill={"streaming": {"dense_tail": 0}}) == config_for(model)
