"""generate() on a patched model: all heads retrieval gives stock Transformers' tokens, mixed roles the dense mask's."""

from __future__ import annotations

import pytest
import torch
from helpers.generation import MODES, NEW, prompt, run, word_tokenizer
from helpers.tiny import FAMILIES, SLIDING, DenseMask, config_for, tiny_model
from transformers import DynamicCache, TextStreamer, pipeline

from hf_longctx import LongCtxCache, patch_model, patched, report


@pytest.mark.spanning
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_retrieval_gives_stock_tokens(family, mode):
    model = tiny_model(family)
    want = run(model, mode)
    with patched(model, config_for(model, "retrieval")):
        assert torch.equal(run(model, mode), want)
    assert torch.equal(run(model, mode), want)


@pytest.mark.spanning
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_roles_give_the_dense_mask_tokens(family, mode):
    model = tiny_model(family, torch.float64)
    config = config_for(model, "mixed", 3, 11)
    dense = run(model, mode)
    with DenseMask(model, config):
        want = run(model, mode)
    patch_model(model, config)
    got = run(model, mode)
    assert torch.equal(got, want)
    assert not torch.equal(got, dense), "the streaming rule must change something, or this test shows nothing"


def test_assisted_generation_with_a_streaming_assistant():
    model, assistant = tiny_model("llama"), tiny_model("llama")
    assistant.load_state_dict(model.state_dict())
    want = run(model, "assisted", assistant_model=assistant)
    patch_model(assistant, config_for(assistant, "mixed"))
    with patched(model, config_for(model, "retrieval")):
        assert torch.equal(run(model, "assisted", assistant_model=assistant), want)
    with patched(model, config_for(model, "mixed")):
        assert torch.equal(run(model, "assisted", assistant_model=assistant), run(model, "assisted"))
    assert report(assistant).forwards > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_many_turns_over_the_returned_cache_equal_one_text(family, roles):
    model = tiny_model(family, torch.float64)
    patch_model(model, config_for(model, roles))
    text, cache = prompt("greedy")["input_ids"][:1], None
    for turn in range(3):
        fresh = model.generate(input_ids=text, max_new_tokens=5)
        out = model.generate(input_ids=text, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, fresh)
        cache = out.past_key_values
        assert isinstance(cache, LongCtxCache)
        text = torch.cat([fresh, torch.full((1, 3 + turn), 7 + turn)], 1)


def test_scores_are_bit_equal_with_the_stock_kernel():
    for family in FAMILIES:
        model = tiny_model(family)
        ids = torch.randint(3, 97, (2, 45))
        asked = {"max_new_tokens": NEW, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        for chunk in ({}, {"prefill_chunk_size": 11, "cache_implementation": "dynamic"}):
            want = model.generate(input_ids=ids, **asked, **chunk)
            with patched(model, config_for(model, "retrieval", kernel="stock")):
                got = model.generate(input_ids=ids, **asked, **chunk)
                assert report(model).kernels == ("stock",)
            assert torch.equal(got.sequences, want.sequences)
            for ours, theirs in zip(got.scores + got.logits, want.scores + want.logits, strict=True):
                assert torch.equal(ours, theirs)


def test_streamer_and_pipeline(capsys):
    tokenizer = word_tokenizer()
    model = tiny_model("llama")
    text = " ".join(f"w{i % 90}" for i in range(3, 60))
    want = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)(text)
    patch_model(model, config_for(model, "retrieval"))
    assert (
        pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)(text) == want
    )
    capsys.readouterr()
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, streamer=TextStreamer(tokenizer))
    assert want[0]["generated_text"].split()[-1] in capsys.readouterr().out


@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("mode", ["greedy", "chunks", "beams", "prompt lookup", "no cache"])
def test_sliding_layers_keep_their_own_window(family, mode):
    model = tiny_model(family, sliding=13)
    # These give greedy tokens; Transformers 5.0 itself cannot roll a sliding cache back, nor fill it chunk by chunk.
    greedy = mode in ("prompt lookup", "chunks")
    want = model.generate(**prompt(mode), max_new_tokens=NEW) if greedy else run(model, mode)
    with patched(model, config_for(model, "retrieval")):
        assert torch.equal(run(model, mode), want)
        assert report(model).window_layers == ((0, 1, 2) if family == "mistral" else (1,))


@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_of_the_user_gives_the_same_tokens(family, roles):
    model = tiny_model(family, sliding=13) if family == "mistral" else tiny_model(family)
    patch_model(model, config_for(model, roles))
    want = run(model, "greedy")
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        LongCtxCache(model),
        LongCtxCache(model, max_tokens=80),
    ):
        assert torch.equal(run(model, "greedy", past_key_values=cache), want)
    assert torch.equal(run(model, "greedy", cache_implementation="dynamic"), want)
    assert any("DynamicCache" in note for note in report(model).notes)


def test_a_padded_batch_equals_its_rows_alone():
    model = tiny_model("qwen3", torch.float64)
    patch_model(model, config_for(model, "mixed"))
    for chunk in ({}, {"prefill_chunk_size": 8}):
        batch = prompt("greedy")
        together = model.generate(**batch, max_new_tokens=NEW, **chunk)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = model.generate(input_ids=batch["input_ids"][row][mask][None], max_new_tokens=NEW)
            assert torch.equal(together[row][-NEW:], alone[0, -NEW:])
