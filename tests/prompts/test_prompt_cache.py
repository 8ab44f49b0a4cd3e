"""PromptCache: answers are those of a fresh generate(), a prompt is read and held once, threads and limits hold."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.caches import live_bytes, patched_tiny
from helpers.generation import word_tokenizer
from helpers.tiny import FAMILIES, config_for, tiny_model

from hf_longctx import (
    CacheError,
    ConfigError,
    LongCtxCache,
    PromptCache,
    UnsupportedModeError,
    UnsupportedModelError,
    patch_model,
    report,
)
from hf_longctx.cache.seam import CACHE
from hf_longctx.prompts.prompt import Prompt, groups
from hf_longctx.stores.base import SLACK, SPARE
from hf_longctx.stores.sink_recent import SinkRecentStore

NEW = 9


def some(tokens: int) -> list[int]:
    return torch.randint(3, 97, (tokens,)).tolist()


def fresh(model, ids, **kwargs) -> list[int]:
    """What the model says after ``ids``, all of it read anew."""
    given = torch.tensor([list(ids)])
    asked = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(given), **kwargs}
    out = model.generate(given, **asked)
    return out[:, len(ids) :].tolist() if len(out) > 1 else out[0, len(ids) :].tolist()


def chatty(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("prompt", [1, 2, 30, 300, 600])
@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_answers_are_those_of_a_fresh_reading(prompt, roles):
    model = patched_tiny(roles, recent=24)
    ids, questions = some(prompt), [some(length) for length in (5, 1, 12, 5, 90, 3, 0)]
    handle = PromptCache(model).prefill(ids)
    want = [fresh(model, ids + question) for question in questions]
    assert handle.ask(questions, max_new_tokens=NEW) == want
    assert handle.ask(questions, max_new_tokens=NEW, batch_size=2) == want
    assert [handle.generate(question, max_new_tokens=NEW) for question in questions] == want
    assert handle.ask([], max_new_tokens=NEW) == []
    other = PromptCache(model).prefill([*ids[:-1], ids[-1] % 90 + 3])
    assert other.ask(questions, max_new_tokens=NEW) != want, "a control"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_and_without_windows(family):
    for sliding in (None, None if family == "llama" else 13):
        model = tiny_model(family, torch.float64, sliding=sliding)
        patch_model(model, config_for(model, "by layer"))
        ids, questions = some(70), [some(length) for length in (4, 9, 1)]
        handle = PromptCache(model, chunk_size=11).prefill(ids)
        assert handle.ask(questions, max_new_tokens=NEW) == [fresh(model, ids + question) for question in questions]


def test_questions_of_different_lengths_share_a_forward(monkeypatch):
    model = patched_tiny()
    ids = some(300)
    handle, seen = PromptCache(model).prefill(ids), []
    monkeypatch.setattr(model, "forward", counting(model.forward, seen))
    questions = [some(length) for length in (5, 1, 12)]
    handle.ask(questions, max_new_tokens=2)
    assert seen == [(3, 13), (3, 1)], "the last token of the prompt is read with the questions"
    seen.clear()
    monkeypatch.setattr(SinkRecentStore, "staggers", False)
    handle.ask([*questions, some(5)], max_new_tokens=1)
    assert seen == [(1, 2), (2, 6), (1, 13)], "a store that cannot go back takes equal lengths alone"
    assert groups([9, 1, 300, 2, 256], 255, 8) == [[1, 3, 0, 4], [2]]
    assert groups([9, 1, 300, 2, 256], 299, 2) == [[1, 3], [0, 4], [2]]


def counting(forward, seen):
    def counted(*args, **kwargs):
        seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape))
        return forward(*args, **kwargs)

    return counted


MODES = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "sample": {"do_sample": True, "top_k": 20},
    "penalty": {"repetition_penalty": 1.5},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_takes_the_arguments_of_generate(mode):
    model = patched_tiny()
    ids, questions = some(60), [some(7), some(3)]
    handle, kwargs = PromptCache(model).prefill(ids), {"max_new_tokens": NEW, **MODES[mode]}
    sampled = "do_sample" in kwargs
    want, got = [], []
    for question in questions:
        torch.manual_seed(3)
        want.append(fresh(model, ids + question, **kwargs))
        torch.manual_seed(3)
        got.append(handle.generate(question, **kwargs))
    assert got == want
    if not sampled:
        assert handle.ask(questions, **kwargs) == want


def test_what_ends_an_answer_is_left_out(monkeypatch):
    model, tokenizer, given = patched_tiny(), word_tokenizer(), []
    ids, questions = some(60), [some(7), some(3), some(5)]
    handle = PromptCache(model, tokenizer).prefill(ids)
    want = [fresh(model, ids + question, max_new_tokens=30) for question in questions]
    stop = want[0][4]
    cut = [one[: one.index(stop)] if stop in one else one for one in want]
    assert handle.ask(questions, max_new_tokens=30, eos_token_id=stop) == cut
    assert cut[0] != want[0]
    model.generation_config.eos_token_id = [stop, 2]
    assert handle.ask(questions, max_new_tokens=30) == cut
    model.generation_config.eos_token_id = None
    words = [" ".join(f"w{token}" for token in question) for question in questions]
    texts = handle.ask(words, max_new_tokens=30, eos_token_id=stop)
    assert texts == [tokenizer.decode(one, skip_special_tokens=True) for one in cut]

    def ends(input_ids, scores, **kwargs):
        return input_ids[:, -1] == stop

    # Transformers pads a row that ended before its neighbours, where there is an eos.
    more = {"stopping_criteria": [ends], "eos_token_id": 96, "pad_token_id": 96}
    ended = handle.ask(questions, max_new_tokens=30, **more)
    assert ended == [one[: one.index(stop) + 1] if stop in one else one for one in want]
    more["eos_token_id"], more["pad_token_id"] = 96, 95
    assert handle.ask(questions, max_new_tokens=30, **more) == ended
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: given.append(kwargs) or ids)
    handle.generate("w5", stop_strings=["w7"])
    assert given[0]["tokenizer"] is tokenizer


def test_a_chat_goes_on_from_its_handle():
    model = patched_tiny()
    handle = start = PromptCache(model).prefill(some(120))
    text = start.ids.tolist()
    for turn in range(4):
        question = some(3 + turn)
        answer, handle = handle.generate(question, max_new_tokens=NEW, return_handle=True)
        assert answer == fresh(model, text + question)
        text += question + answer
        assert handle.ids.tolist() == text
        assert handle.cache.seen == len(text) - 1
    assert start.generate(question, max_new_tokens=NEW) == fresh(model, start.ids.tolist() + question)
    with pytest.raises(UnsupportedModeError, match="a second time"):
        handle.generate(some(2), prompt_lookup_num_tokens=3, eos_token_id=96)
    assert PromptCache(model).prefill([5]).generate([6, 7], prompt_lookup_num_tokens=3, eos_token_id=96)
    with pytest.raises(ConfigError, match="return_handle"):
        handle.generate(some(2), num_beams=2, return_handle=True)


def test_a_fork_serves_generate_calls_of_the_user():
    model = patched_tiny()
    ids, question = some(90), some(4)
    handle = PromptCache(model).prefill(ids)
    whole = torch.tensor([ids + question])
    out = model.generate(whole, past_key_values=handle.fork().cache, max_new_tokens=NEW, do_sample=False)
    assert out[0, whole.shape[1] :].tolist() == fresh(model, ids + question)
    model.generate(whole, past_key_values=handle.cache, max_new_tokens=NEW)
    with pytest.raises(CacheError, match="somebody went on with"):
        handle.generate(question)


# ---- bytes ----


def held(*things) -> int:
    """Bytes of the distinct storages behind prompts, caches and tables."""
    storages = {}
    for thing in things:
        caches = [p.cache for p in thing._table.values()] if isinstance(thing, PromptCache) else [thing]
        for cache in (cache.cache if isinstance(cache, Prompt) else cache for cache in caches):
            for layer in cache.layers:
                for tensor in layer.tensors():
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("number", [2, 7])
def test_many_questions_hold_the_prompt_once(number, monkeypatch):
    model = patched_tiny(recent=24, layers=2)
    prompts = PromptCache(model)
    handle, seen = prompts.prefill(some(3001)), []
    generate = model.generate

    def watched(*args, **kwargs):
        out = generate(*args, **kwargs)
        seen.append(held(kwargs[CACHE]))
        assert report(model).nbytes == seen[-1]
        return out

    monkeypatch.setattr(model, "generate", watched)
    questions = [some(10 + i) for i in range(number)]
    handle.ask(questions, max_new_tokens=20)
    token, heads = 2 * 8 * 8, 2 * 2  # bytes of k and v of one head in float64; retrieval heads, streaming heads
    prefix, rings = heads * token * 3375, heads * token * (4 + 24 + SLACK + 1)
    grown = len(questions[-1]) + 1 + SPARE + 1  # with the first token of the answer that had no room
    own = heads * token * (grown + SPARE)
    assert seen == [prefix + number * (own + rings)]
    assert held(prompts, handle) == prefix + 2 * rings
    assert held(prompts) == prompts.nbytes == handle.nbytes == prefix + rings


def test_nothing_stays_after_an_answer():
    model = patched_tiny()
    prompts = PromptCache(model)
    handle = prompts.prefill(some(500))
    handle.ask([some(5), some(9)], max_new_tokens=3)
    before = live_bytes()
    for _ in range(3):
        handle.ask([some(5), some(9)], max_new_tokens=3)
        handle.generate(some(5), max_new_tokens=3, return_handle=True)
    assert live_bytes() == before
    watched = [weakref.ref(handle.cache), *(weakref.ref(prompt) for prompt in prompts._table.values())]
    prompts.clear()
    assert prompts.nbytes == len(prompts) == 0
    assert handle.generate(some(3), max_new_tokens=1), "a handle outlives its place in the table"
    del handle
    gc.collect()
    assert all(one() is None for one in watched)


def test_the_limit_drops_the_least_recently_used():
    model = patched_tiny("retrieval")
    documents = [some(300) for _ in range(4)]
    alone = PromptCache(model).prefill(documents[0]).nbytes
    prompts = PromptCache(model, max_bytes=2 * alone + 1)
    for document in documents[:2]:
        prompts.prefill(document)
    prompts.prefill(documents[0])
    kept = prompts.prefill(documents[2])
    assert (len(prompts), prompts.evicted, prompts.nbytes) == (2, 1, 2 * alone)
    before = prompts.tokens_read
    prompts.prefill(documents[0])
    prompts.prefill(documents[2])
    assert prompts.tokens_read == before
    prompts.prefill(documents[1])
    assert prompts.tokens_read == before + 299, "the second was dropped"
    prompts.prefill(documents[3])
    assert prompts.evicted == 3
    assert kept.generate(max_new_tokens=3) == fresh(model, documents[2], max_new_tokens=3)


def test_a_shared_beginning_counts_once():
    model = patched_tiny("retrieval")
    system = some(3000)
    prompts = PromptCache(model)
    held_by_system = prompts.prefill(system).nbytes
    for _ in range(5):
        prompts.prefill(system + some(20))
    assert prompts.nbytes < 1.2 * held_by_system
    assert len(prompts) == 6


def test_a_prompt_over_the_limit_is_served_and_not_kept(caplog):
    model = patched_tiny()
    ids = some(400)
    prompts = PromptCache(model, max_bytes=1000)
    with caplog.at_level(logging.WARNING):
        handle = prompts.prefill(ids)
    assert "is served but not kept" in caplog.text
    assert (len(prompts), prompts.nbytes, prompts.evicted) == (0, 0, 0)
    assert handle.generate(max_new_tokens=NEW) == fresh(model, ids)


# ---- what is reused ----


@pytest.mark.quick
def test_the_longest_beginning_is_found():
    model = patched_tiny(recent=24)
    system, document, turn = some(200), some(700), some(30)
    prompts, read = PromptCache(model), []

    def asked(ids) -> tuple[int, int]:
        before = (prompts.tokens_read, prompts.tokens_reused)
        handle = prompts.prefill(ids)
        assert handle.ids.tolist() == ids
        assert handle.generate(max_new_tokens=NEW) == fresh(model, ids)
        read.append(ids)
        return prompts.tokens_read - before[0], prompts.tokens_reused - before[1]

    assert asked(system) == (199, 0)
    assert asked(system + document) == (700, 199)
    assert asked(system + document + turn) == (30, 899)
    assert asked(system + document) == (0, 899)
    # Within what streaming heads can take back, the common part of a longer prompt is enough ...
    assert asked(system + document + turn[:20] + some(5)) == (4, 920)
    assert asked(system + document[:600]) == (0, 799)
    # ... and beyond it a whole prompt is needed.
    assert asked(system + document[:100] + some(50)) == (150, 199)
    assert asked(document + turn) == (729, 0)
    assert (prompts.hits, prompts.misses) == (6, 2)
    assert prompts.tokens_read + prompts.tokens_reused == sum(len(ids) - 1 for ids in read)


def test_what_two_prompts_begin_with_is_kept_for_the_third():
    model = patched_tiny(recent=24)
    document, prompts = some(600), PromptCache(model, chunk_size=128)
    questions = [some(300) for _ in range(4)]
    read = []
    for question in questions:
        before = prompts.tokens_read
        handle = prompts.prefill(document + question)
        read.append(prompts.tokens_read - before)
        assert handle.generate(max_new_tokens=NEW) == fresh(model, document + question)
    assert read == [899, 899, 299, 299], "no window goes back 300 tokens"
    assert [len(one) for one in prompts._table.values()].count(601) == 1
    before = len(prompts)
    prompts.prefill(document[:200] + some(300))
    assert len(prompts) == before + 1, "200 tokens are too few to be kept"


@pytest.mark.parametrize("store", [None, {"store": "evicted", "budget": {"share": 0.5}, "rule": {"score": "key_norm"}}])
def test_a_stopped_reading_keeps_what_was_read(store):
    model = tiny_model("llama", torch.float64)
    patch_model(model, config_for(model, "mixed", stores=None if store is None else {"retrieval": store}))
    ids, asked = some(100), []
    prompts = PromptCache(model, chunk_size=20)
    part = prompts.prefill(ids, stop=lambda: asked.append(0) or len(asked) > 3)
    assert len(part) == 61 and part.ids.tolist() == ids[:61] and part.cache.seen == 60
    assert len(prompts) == (store is None), "an eviction waits for the end of a prompt"
    whole = prompts.prefill(ids)
    assert (len(whole), prompts.tokens_read) == (100, 99 if store is None else 60 + 99)
    assert whole.generate(max_new_tokens=NEW) == PromptCache(model).prefill(ids).generate(max_new_tokens=NEW)
    assert len(prompts.prefill(some(30), stop=lambda: True)) == 1, "nothing was read"
    assert len(prompts) == (2 if store is None else 1)


def test_of_a_chat_the_first_prompt_and_the_last_turn_stay():
    model = patched_tiny(recent=24)
    prompts = PromptCache(model)
    handle = prompts.prefill(some(60))
    lengths = []
    for _ in range(3):
        _, done = handle.generate(max_new_tokens=4, return_handle=True)
        prompts.add(done, after=handle)
        lengths.append(sorted(len(one) for one in prompts._table.values()))
        handle = prompts.prefill([*done.ids.tolist(), *some(6)])
    assert lengths == [[60, 64], [60, 70, 74], [60, 80, 84]]
    last = prompts.prefill([*handle.ids.tolist(), 5])
    assert last.generate(max_new_tokens=NEW) == fresh(model, last.ids.tolist())
    other = prompts.prefill([*done.ids.tolist(), *some(9)])
    _, end = other.generate(max_new_tokens=4, return_handle=True)
    prompts.add(end, after=other)
    assert len(done) in {len(one) for one in prompts._table.values()}, "another prompt goes on from it too"


def test_retrieval_heads_alone_go_back_to_anything_in_common():
    model = patched_tiny("retrieval")
    first, prompts = some(500), PromptCache(model)
    prompts.prefill(first)
    second = first[:100] + some(300)
    handle = prompts.prefill(second)
    assert (prompts.tokens_reused, prompts.tokens_read) == (100, 499 + 299)
    assert handle.generate(max_new_tokens=NEW) == fresh(model, second)


def test_messages_of_a_chat():
    model, tokenizer = patched_tiny(), chatty(word_tokenizer())
    prompts = PromptCache(model, tokenizer)
    document = " ".join(f"w{token}" for token in some(80))
    messages = [{"role": "system", "content": document}]
    prompts.prefill(messages, add_generation_prompt=False)
    messages.append({"role": "user", "content": "w7 w8 w9"})
    handle = prompts.prefill(messages)
    assert (prompts.tokens_read, prompts.tokens_reused) == (81 + 6, 81)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert handle.ids.tolist() == tokenizer(text)["input_ids"]
    answer, after = handle.generate(max_new_tokens=NEW, return_handle=True)
    assert isinstance(answer, str)
    prompts.add(after)
    messages += [{"role": "assistant", "content": f"w50 {answer}"}, {"role": "user", "content": "w5"}]
    del messages[-2]
    follow = after.ids.tolist() + some(4)
    before = prompts.tokens_read
    prompts.prefill(follow)
    assert prompts.tokens_read - before == 4, "the answer was not read again"
    with pytest.raises(ConfigError, match="chat template"):
        prompts.prefill("w5", add_generation_prompt=False)
    with pytest.raises(ConfigError, match="no chat template"):
        PromptCache(model, word_tokenizer()).prefill(messages)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="chat template refuses these messages: roles must alternate"):
        prompts.prefill(messages)


def test_prompts_of_another_config_are_dropped():
    model = patched_tiny()
    prompts, ids = PromptCache(model), some(50)
    prompts.prefill(ids)
    patch_model(model, config_for(model, recent=5))
    handle = prompts.prefill(ids)
    assert (len(prompts), prompts.misses, prompts.hits) == (1, 2, 0)
    assert handle.generate(max_new_tokens=NEW) == fresh(model, ids)


@pytest.mark.quick
def test_refusals():
    model = patched_tiny()
    prompts = PromptCache(model)
    handle = prompts.prefill(torch.tensor([[5, 6, 7]]))
    for given, match in (("w5", "no tokenizer"), ([], "nothing"), ([0.5], "whole numbers"), ([[5], [6]], "one row")):
        with pytest.raises(ConfigError, match=match):
            prompts.prefill(given)
    for given in (["w5", "w6"], None):
        with pytest.raises(
            ConfigError, match=f"token ids: got a {type(given).__name__} of something else. Give one text"
        ):
            prompts.prefill(given)
    own = ("attention_mask", "past_key_values", "cache", "use_cache", "return_dict_in_generate", "prefill_chunk_size")
    for name in own:
        with pytest.raises(ConfigError, match=f"{name}: a prompt sets this itself"):
            handle.generate([5], **{name: True})
    with pytest.raises(ConfigError, match="list of texts"):
        handle.ask("w5")
    with pytest.raises(ConfigError, match="batch_size"):
        handle.ask([[5]], batch_size=0)
    with pytest.raises(ConfigError, match="max_bytes"):
        PromptCache(model, max_bytes=0)
    with pytest.raises(UnsupportedModelError):
        PromptCache(tiny_model("llama"))
    model.train()
    with pytest.raises(UnsupportedModeError, match="eval"):
        prompts.prefill([5, 6])


# ---- threads ----


@pytest.fixture
def gate(monkeypatch):
    """A model whose next reading waits: (model, started, go, shapes that were read)."""
    model, seen = patched_tiny(), []
    started, go = threading.Event(), threading.Event()
    forward = counting(model.forward, seen)

    def waiting(*args, **kwargs):
        started.set()
        assert go.wait(60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", waiting)
    yield model, started, go, seen
    go.set()


def test_a_second_thread_waits_for_the_first(gate):
    model, started, go, seen = gate
    prompts, ids, other = PromptCache(model), some(80), some(40)
    go.set()
    prompts.prefill(other)
    seen.clear(), started.clear(), go.clear()
    with ThreadPoolExecutor(4) as pool:
        handles = [pool.submit(prompts.prefill, ids)]
        assert started.wait(60)
        handles += [pool.submit(prompts.prefill, ids) for _ in range(2)]
        assert pool.submit(prompts.prefill, other).result(60).ids.tolist() == other, "the table is not locked meanwhile"
        assert len(prompts) == 1
        assert prompts.nbytes > 0
        assert not any(handle.done() for handle in handles)
        go.set()
        read = [handle.result(60) for handle in handles]
    assert seen == [(1, 79)]
    assert (prompts.hits, prompts.misses, prompts.tokens_read) == (3, 2, 79 + 39)
    assert len({id(handle.cache) for handle in read}) == 3
    assert len({tuple(handle.generate(max_new_tokens=3)) for handle in read}) == 1


def test_a_second_thread_reads_where_the_first_failed(gate, monkeypatch):
    model, started, go, seen = gate
    prompts, ids = PromptCache(model), some(80)
    catch_up, failed = Prompt.catch_up, []

    def failing(prompt, *given):
        if not failed:
            failed.append(True)
            started.set()
            assert go.wait(60)
            raise MemoryError
        return catch_up(prompt, *given)

    monkeypatch.setattr(Prompt, "catch_up", failing)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prompts.prefill, ids)
        assert started.wait(60)
        second = pool.submit(prompts.prefill, ids)
        go.set()
        with pytest.raises(MemoryError):
            first.result(60)
        assert second.result(60).generate(max_new_tokens=NEW) == fresh(model, ids)
    assert (prompts.misses, len(prompts), prompts._reading) == (1, 1, {})


def ask_from_threads(threads: int, asks: int | None, seconds: float | None) -> tuple[PromptCache, int]:
    """Random questions about three documents, of which two fit into the limit; every answer is compared."""
    model = patched_tiny(recent=24)
    documents = [some(length) for length in (500, 400, 450)]
    questions = [some(length) for length in (3, 11, 1, 6)]
    want = {(d, q): fresh(model, doc + text) for d, doc in enumerate(documents) for q, text in enumerate(questions)}
    sizes = [PromptCache(model).prefill(document).nbytes for document in documents]
    gc.collect()
    alive = count_caches()
    prompts = PromptCache(model, max_bytes=sum(sorted(sizes)[1:]) + 1)
    end = None if seconds is None else time.monotonic() + seconds

    def work(thread: int) -> int:
        rng, done = random.Random(thread), 0
        while (done < asks) if end is None else (time.monotonic() < end):
            d, number = rng.randrange(3), rng.randint(1, 3)
            picked = rng.sample(range(4), number)
            handle = prompts.prefill(documents[d])
            assert handle.ask([questions[q] for q in picked], max_new_tokens=NEW) == [want[d, q] for q in picked]
            assert prompts.nbytes <= prompts.max_bytes
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    gc.collect()
    assert count_caches() - alive == len(prompts) <= 2
    assert prompts.hits + prompts.misses == done
    assert prompts.misses == len(prompts) + prompts.evicted
    prompts.clear()
    gc.collect()
    assert count_caches() == alive
    return prompts, done


def count_caches() -> int:
    return sum(type(thing) is LongCtxCache for thing in gc.get_objects())


def test_eight_threads_over_three_documents():
    prompts, done = ask_from_threads(8, asks=4, seconds=None)
    assert done == 32
    assert prompts.evicted > 0
    assert prompts.hits > 0


@pytest.mark.slow
def test_eight_threads_over_three_documents_for_a_minute():
    prompts, done = ask_from_threads(8, asks=None, seconds=60)
    assert done >= 8
    assert prompts.evicted > 0
    assert prompts.hits > 0
