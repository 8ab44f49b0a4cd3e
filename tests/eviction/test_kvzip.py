"""``score: kvzip``: its scores by eager attention of whole texts, what compress() leaves, and who may ask for it."""

from __future__ import annotations

import pytest
import torch
from helpers.config_cases import refused
from helpers.every_family import Case
from helpers.every_family import tiny_model as random_model
from helpers.evicting import BY, evicting, keys_of_heads, logits_after, read, some, state_of_heads
from helpers.method_cases import eager_weights
from helpers.tiny import FAMILIES, config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe

from hf_longctx import CacheError, ConfigError, LongCtxCache, PromptCache, UnsupportedModeError, patch_model, report
from hf_longctx.eviction._repetition import BEFORE
from hf_longctx.eviction.kvzip import PART, WHOLE, Kvzip, instruction

SINK = 4
RULE = {"score": "kvzip", "chunk": 33, "words": False}


def zipping(family="llama", model=None, **store):
    return evicting(
        family, model=model, **{"rule": RULE, "sink": SINK, "by": "model", "budget": {"share": 0.4}, **store}
    )


def by_definition(model, ids: torch.Tensor, chunk: int, instruct=lambda before: before, start=SINK) -> torch.Tensor:
    """Scores ``[layers, n, S]`` by eager attention over the text and each of its repetitions."""
    told = ids.tolist()
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    best = torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads, len(told)).double()
    for first in range(start, len(told), chunk):
        part = told[first : first + chunk]
        again = [*instruct(told[max(SINK, first - BEFORE) : first]), *part]
        maps = eager_weights(model, torch.tensor([told + again])).double()[:, :, len(told) :]
        seen = [*range(SINK), *range(first, first + len(part)), *range(len(told), len(told) + len(again))]
        sinks = 1 - maps.sum(-1, keepdim=True) if model.config.model_type == "gpt_oss" else 0
        maps = maps / (maps[..., seen].sum(-1, keepdim=True) + sinks)
        for j in range(first, first + len(part)):
            best[:, :, j] = maps[..., j].amax(2).unflatten(1, (-1, group)).amax(2)
    return best


def judged(cache) -> torch.Tensor:
    return torch.stack([torch.stack(heads) for heads in state_of_heads(cache, "judged")])


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [16, 33, 500])
def test_scores_are_the_largest_weights_of_the_repetition(family, chunk):
    ids = some(90, seed=3)
    model = tiny_model(family, torch.float64) if family in FAMILIES else random_model(Case(family, True))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.2  # so that no softmax is 0 and 1
    want = by_definition(model, ids, chunk)
    zipping(model=model, rule={**RULE, "chunk": chunk})
    cache = read(model, ids)
    cache.compress(budget={"share": 1.0})
    full = [at for at, layer in enumerate(cache.own) if layer.evicting]
    cache.own = [cache.own[at] for at in full]
    got = judged(cache)
    assert full and got.dtype == torch.float64
    torch.testing.assert_close(got, want[full], rtol=0, atol=2e-6)  # their softmax is in float32
    assert not torch.allclose(got, want[full].flip(1), rtol=0, atol=1e-4), "a control"
    assert not got[..., :SINK].any()


@pytest.mark.parametrize("by", BY)
def test_what_is_kept_are_the_highest(by):
    model = zipping(by=by)
    ids = some(120, seed=1)
    dense = read(model, ids)
    cache = dense.fork()
    whole = keys_of_heads(dense)
    cache.compress(budget={"tokens": 40})
    kept = keys_of_heads(cache)
    scores = by_definition(tiny_like(model), ids, 33)
    scores[..., :SINK] = scores[..., -8:] = float("inf")
    counts = [[len(k) for k in heads] for heads in kept]
    assert sum(map(sum, counts)) == 40 * sum(map(len, counts))
    assert (len({count for heads in counts for count in heads}) > 1) == (by != "uniform")
    if by == "model":
        bar = scores.flatten().sort(descending=True).values[40 * scores.shape[0] * scores.shape[1] - 1]
    for layer, heads in enumerate(kept):
        for head, keys in enumerate(heads):
            own = scores[layer, head]
            where = own >= bar if by == "model" else own >= own.sort(descending=True).values[len(keys) - 1]
            assert torch.equal(keys, whole[layer][head][where])
    assert keys_of_heads(dense)[0][0].shape == whole[0][0].shape, "a fork is not changed"


def tiny_like(model):
    """The same model without a patch."""
    other = tiny_model(model.config.model_type, torch.float64)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("by", ["uniform", "model"])
def test_a_budget_of_everything_is_dense(by):
    model = zipping(by=by)
    ids, then = some(100), some(6, seed=5)
    dense = logits_after(model, read(model, ids), then)
    cache = read(model, ids)
    cache.compress(budget={"share": 1.0})
    torch.testing.assert_close(logits_after(model, cache, then), dense, rtol=0, atol=1e-12)
    cache.compress(budget={"share": 0.3})
    assert (logits_after(model, cache, then) - dense).abs().max() > 1e-3, "a control"


def test_chunks_of_the_prompt_and_streaming_heads_beside_it():
    model = zipping(roles="mixed")
    ids, then = some(100), some(6, seed=5)
    found = []
    for chunk in (None, 7):
        cache = read(model, ids, chunk=chunk)
        cache.compress()
        found.append(logits_after(model, cache, then))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_pads_on_the_left_are_no_text():
    model = zipping(by="head")
    ids, then = some(80), some(4, seed=2)
    cache = read(model, ids)
    cache.compress()
    padded = LongCtxCache(model)
    longer = torch.cat([torch.zeros(9).long(), ids, then])
    mask, places = (torch.arange(93) >= 9)[None].long(), (torch.arange(93) - 9).clamp(min=0)[None]
    got = []
    with torch.no_grad():
        for low, high in ((0, 89), (89, 90), (90, 91), (91, 92), (92, 93)):
            given = {"attention_mask": mask[:, :high], "position_ids": places[:, low:high]}
            got.append(model(longer[None, low:high], past_key_values=padded, **given).logits[0])
            if not low:
                padded.compress()
    got = got[1:]
    torch.testing.assert_close(torch.cat(got), logits_after(model, cache, then), rtol=0, atol=1e-12)


def test_the_cache_and_the_report_are_as_before_but_for_what_left():
    model = zipping()
    cache = read(model, some(100))
    before = cache.nbytes
    seen, ids = cache.seen, cache.ids.clone()
    cache.compress()
    assert cache.seen == seen and torch.equal(cache.ids, ids) and cache.nbytes < 0.75 * before
    told = report(model)
    assert told.seen == 100 and told.alive and told.nbytes == cache.nbytes


def test_until_it_is_asked_it_is_dense_and_the_report_says_so():
    model = zipping()
    ids = some(1, 150)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert all(len(k) == cache.seen for heads in keys_of_heads(cache) for k in heads)
    assert "a prompt ended before cache.compress() was called, which score kvzip waits for" in str(report(model))
    cache.evict()
    assert all(len(k) == cache.seen for heads in keys_of_heads(cache) for k in heads)
    zipping(model=model)
    cache = read(model, ids[0, :-1])
    cache.compress()
    model.generate(ids, max_new_tokens=3, past_key_values=cache)
    assert "waits for" not in str(report(model))
    assert all(len(k) < cache.seen for heads in keys_of_heads(cache) for k in heads)


@pytest.mark.parametrize("by", ["uniform", "model"])
def test_a_text_that_goes_on_is_judged_from_there(by):
    model = zipping(by=by)
    ids = some(130, seed=4)
    cache = read(model, ids[:90])
    cache.compress(budget={"share": 1.0})
    first = judged(cache)
    read(model, ids[90:], cache)
    cache.compress(budget={"share": 1.0})
    got = judged(cache)
    assert torch.equal(got[..., :90], first)
    torch.testing.assert_close(
        got, by_definition(tiny_like(model), ids, 33, start=90).where(torch.arange(130) >= 90, got), rtol=0, atol=2e-6
    )
    assert got[..., 90:].all()
    cache.crop(80)
    read(model, ids[80:], cache)
    cache.compress(budget={"share": 1.0})
    again = judged(cache)
    assert torch.equal(again[..., :80], first[..., :80]) and again.shape == got.shape


@pytest.mark.parametrize("by", ["uniform", "head", "model"])
def test_after_an_eviction_the_rest_keeps_its_scores(by):
    model = zipping(by=by)
    ids = some(130, seed=4)
    cache = read(model, ids[:90])
    cache.compress(budget={"tokens": 40})
    before = state_of_heads(cache, "judged")
    assert [len(k) for heads in keys_of_heads(cache) for k in heads] == [len(x) for heads in before for x in heads]
    read(model, ids[90:], cache)
    cache.compress(budget={"tokens": 60})
    after = [len(x) for heads in state_of_heads(cache, "judged") for x in heads]
    assert [len(k) for heads in keys_of_heads(cache) for k in heads] == after
    assert logits_after(model, cache, some(3)).isfinite().all()


@pytest.mark.parametrize("rule", [RULE, {"score": "key_norm"}, {"score": "snapkv", "window": 8}])
@pytest.mark.parametrize("by", ["uniform", "head", "model"])
def test_questions_on_one_kept_prompt_equal_fresh_runs(rule, by):
    model = evicting(rule=rule, by=by, budget={"share": 0.3})
    document = some(140).tolist()
    questions = [some(9, seed=7).tolist(), some(13, seed=8).tolist()]
    asked = {"max_new_tokens": 8, "do_sample": False}

    def fresh(question, evict: bool = True):
        cache = read(model, torch.tensor(document[:-1]))
        if rule["score"] != "snapkv" and evict:
            cache.end_document()
        whole = torch.tensor([document + question])
        return model.generate(whole, past_key_values=cache, **asked)[0, whole.shape[1] :].tolist()

    want = [fresh(question) for question in questions]
    prompts = PromptCache(model)
    handle = prompts.prefill(document)
    gone = [len(k) < 139 for heads in keys_of_heads(handle.cache) for k in heads]
    assert any(gone) == (rule["score"] != "snapkv"), "a score that looks at the last queries waits for the question"
    assert handle.ask(questions, **asked) == want
    assert [handle.generate(question, **asked) for question in questions] == want
    assert prompts.prefill(document).ask(questions, **asked) == want and prompts.hits == 1
    if rule["score"] == "kvzip":
        assert [fresh(question, evict=False) for question in questions] != want, "a control"


def test_a_longer_prompt_goes_on_from_what_is_left_and_a_shorter_one_is_read_anew():
    model = zipping()
    document = some(140).tolist()
    prompts = PromptCache(model)
    prompts.prefill(document)
    longer = prompts.prefill([*document, *some(40, seed=9).tolist()])
    assert prompts.tokens_reused == 139 and prompts.hits == 1
    assert all(len(k) < 179 for heads in keys_of_heads(longer.cache) for k in heads)
    prompts.prefill(document[:100])
    assert prompts.misses == 2


class Chat:
    """A tokenizer of letters, with a chat template."""

    chat_template = "{{ messages }}"

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
        assert add_generation_prompt and not tokenize and not enable_thinking
        return f"<user>{messages[0]['content']}</user><model>"


def test_the_instruction_asks_for_the_whole_text_then_for_what_follows():
    chat, none = Chat(), torch.arange(0)
    ids = chat(WHOLE, add_special_tokens=False)["input_ids"] + chat("</user><model>", False)["input_ids"]
    assert instruction(chat, none).tolist() == ids
    part = chat(PART, False)["input_ids"] + [5, 6] + chat("</user><model>", False)["input_ids"]
    assert instruction(chat, torch.tensor([5, 6])).tolist() == part
    plain = byte_bpe()
    assert plain.decode(instruction(plain, none)) == WHOLE + "\n"


def test_with_words_the_scores_are_those_after_the_instruction():
    model = tiny_model("llama", torch.float64)
    ids = some(90, seed=3)
    want = by_definition(model, ids, 33, lambda before: instruction(Chat(), torch.tensor(before).long()).tolist())
    zipping(model=model, rule={"score": "kvzip", "chunk": 33})
    cache = read(model, ids)
    cache.compress(budget={"share": 1.0}, tokenizer=Chat())
    torch.testing.assert_close(judged(cache), want, rtol=0, atol=2e-6)


def test_another_score_and_budget_than_the_configs():
    model = evicting(rule={"score": "key_norm"}, by="uniform", budget={"tokens": 50})
    ids, then = some(100), some(5, seed=6)
    plain, other = read(model, ids), read(model, ids)
    plain.evict()
    other.compress(budget={"tokens": 20})
    assert len(keys_of_heads(plain)[0][0]) == 50 and len(keys_of_heads(other)[0][0]) == 20
    other = read(model, ids)
    other.compress(RULE, budget={"tokens": 50}, by="layer")
    assert (logits_after(model, other, then) - logits_after(model, plain, then)).abs().max() > 1e-4
    norms = read(model, ids)
    norms.compress("key_norm")
    torch.testing.assert_close(logits_after(model, norms, then), logits_after(model, plain, then), rtol=0, atol=0)
    evicting(model=model, rule={"score": "snapkv", "window": 16}, by="uniform", budget={"tokens": 50})
    cache = read(model, ids)
    cache.compress({"score": "snapkv", "window": 8})
    evicting(model=model, rule={"score": "snapkv", "window": 8}, by="uniform", budget={"tokens": 50})
    want = read(model, ids)
    want.evict()
    assert torch.equal(keys_of_heads(cache)[1][2], keys_of_heads(want)[1][2])


def test_after_another_score_the_configs_own_goes_on():
    model = evicting(rule={"score": "observed"}, by="head", budget={"share": 0.5})
    cache = read(model, some(100))
    cache.compress("key_norm", budget={"share": 0.4})
    model.generate(some(1, 240), past_key_values=cache, max_new_tokens=4)
    assert all(len(k) < 200 for heads in keys_of_heads(cache) for k in heads)
    assert logits_after(model, cache, some(3)).isfinite().all()


def test_what_is_refused():
    model = zipping()
    two = LongCtxCache(model)
    with torch.no_grad():
        model(some(2, 50), past_key_values=two)
    with pytest.raises(UnsupportedModeError, match="this cache holds 2 sequences. Compress each alone"):
        two.compress()
    cache = read(model, some(60))
    with pytest.raises(ConfigError, match="tokenizer: got none, and score 'kvzip' asks the model in words"):
        cache.compress(Kvzip())
    with pytest.raises(
        ConfigError, match="by: got 'uniform'.*different numbers of tokens. What works here: head, mode"
    ):
        cache.compress(by="uniform")
    with pytest.raises(CacheError, match="ids: got 3 token ids, and this cache has read 60 tokens"):
        cache.compress(ids=[1, 2, 3])
    with pytest.raises(ConfigError, match="ids: score 'key_norm' reads nothing after the text"):
        cache.compress("key_norm", ids=[1, 2, 3])
    with pytest.raises(CacheError, match="score 'snapkv' .*asks for queries of the prompt"):
        cache.compress("snapkv")
    with pytest.raises(CacheError, match="score 'observed' learns from every query of a prompt"):
        cache.compress("observed")
    with pytest.raises(ConfigError, match="score.score: unknown word 'kvzap'|Did you mean 'kvzip'"):
        cache.compress("kvzap")
    assert all(len(k) == 60 for heads in keys_of_heads(cache) for k in heads), "nothing was changed"
    cache.compress("key_norm")
    with pytest.raises(CacheError, match="repeats the whole text, and tokens of this cache left before by another"):
        cache.compress()
    model.train()
    with pytest.raises(UnsupportedModeError, match="the model is in training mode"):
        other = read(model, some(60))
        model.train()
        other.compress()
    model.eval()


def test_what_a_cache_lacks():
    model = zipping()
    cache = LongCtxCache(model)
    cache.compress()  # nothing was read
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(some(1, 50)), past_key_values=cache)
    with pytest.raises(CacheError, match="they came as inputs_embeds"):
        cache.compress()
    cache.compress(ids=some(1, 50))
    refused(
        lambda: PromptCache(zipping(rule={"score": "kvzip"})), "tokenizer: got none, and score 'kvzip' of the config"
    )
    plain = patch_model(tiny_model(), config_for(tiny_model(), "mixed"))
    with pytest.raises(UnsupportedModeError, match="no head of this cache evicts"):
        LongCtxCache(plain).compress()
    with pytest.raises(ConfigError, match="every: got 64 with score 'kvzip'"):
        zipping(every=64)


@pytest.mark.parametrize("by", BY)
def test_asked_again_about_the_same_text_nothing_more_leaves(by):
    model = zipping(by=by, budget={"tokens": 40})
    cache = read(model, some(120))
    cache.compress()
    before = keys_of_heads(cache)
    cache.compress()
    assert sum(len(k) for heads in before for k in heads) == 40 * 12
    if by != "layer":  # which gives later layers less of a budget once more
        assert all(torch.equal(*pair) for pair in zip(sum(before, []), sum(keys_of_heads(cache), []), strict=True))


@pytest.mark.parametrize("by", ["uniform", "model"])
@pytest.mark.parametrize("budget", [{"share": 1.0}, {"tokens": 40}])
def test_a_saved_cache_goes_on_by_the_same_scores(by, budget, tmp_path):
    model = zipping(by=by)
    ids = some(130, seed=4)
    cache = read(model, ids[:90])
    cache.compress(budget=budget)
    cache.save(tmp_path / "cache", model=model)
    loaded = LongCtxCache.load(tmp_path / "cache", model)
    for one in (cache, loaded):
        read(model, ids[90:], one)
        one.compress(budget={"tokens": 50})
    pairs = zip(sum(keys_of_heads(loaded), []), sum(keys_of_heads(cache), []), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
