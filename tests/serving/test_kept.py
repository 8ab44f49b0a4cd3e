"""``KeptGenerate``: the answers of plain generate(), what it keeps, and what it leaves to plain generate()."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import patched_tiny
from helpers.tiny import config_for, tiny_model
from transformers import GenerationConfig

from hf_longctx import LongCtxCache, UnsupportedModeError, patch_model, unpatch_model
from hf_longctx.cache.seam import CACHE
from hf_longctx.serving.call import CALL, Call, ClientGone
from hf_longctx.serving.kept import KeptGenerate

NEW = 7


def some(tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, tokens))


def kept(model, max_bytes: int = 10**9) -> KeptGenerate:
    return KeptGenerate(model, None, max_bytes=max_bytes, chunk_size=50)


def config(**given) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **{"do_sample": False, **given})


@pytest.mark.quick
@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_turns_of_a_chat(roles):
    model = patched_tiny(roles)
    one, text = kept(model), some(150)
    for _ in range(3):
        want = model.generate(text, generation_config=config())
        out = one(text, generation_config=config(), attention_mask=torch.ones_like(text))
        assert torch.equal(out, want)
        text = torch.cat([out, some(5)], 1)
    assert one.outcomes == {"answered": 3, "kept": 3} and one.tokens == 3 * NEW
    assert one.prompts.tokens_read < 149 + 3 * (NEW + 6)
    assert torch.equal(
        one(text[:, :1], generation_config=config()), model.generate(text[:, :1], generation_config=config())
    )


MODES = {
    "sample": {"do_sample": True, "top_k": 20},
    "penalty": {"repetition_penalty": 1.5},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_go_on_from_a_kept_prompt(mode):
    model = patched_tiny()
    one, text = kept(model), some(60)
    one(text, generation_config=config())
    more = torch.cat([text, some(4)], 1)
    torch.manual_seed(3)
    want = model.generate(more, generation_config=config(**MODES[mode]))
    token = CALL.set(Call())
    CALL.get().seed = 3
    assert torch.equal(one(more, generation_config=config(**MODES[mode])), want)
    CALL.reset(token)
    assert one.outcomes["kept"] == 2 and one.prompts.tokens_reused >= 59


PLAIN = {
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 9},
    "a dict": {"return_dict_in_generate": True},
    "dynamic": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("mode", PLAIN)
def test_modes_that_are_left_to_plain_generate(mode):
    model = patched_tiny()
    one, text = kept(model), some(40)
    torch.manual_seed(3)
    want = model.generate(text, generation_config=config(**PLAIN[mode]))
    torch.manual_seed(3)
    out = one(text, generation_config=config(**PLAIN[mode]))
    assert torch.equal(getattr(out, "sequences", out), getattr(want, "sequences", want))
    assert one.outcomes["plain"] == 1 and len(one.prompts) == 0


def test_inputs_that_are_left_to_plain_generate():
    model = patched_tiny()
    one, text = kept(model), some(40)
    holes = torch.ones_like(text)
    holes[:, :3] = 0
    several = torch.cat([text, some(40)])
    for ids, more in ((text, {"attention_mask": holes}), (several, {}), (text, {CACHE: LongCtxCache(model)})):
        want = model.generate(ids, generation_config=config(), **({} if CACHE in more else more))
        assert torch.equal(one(ids, generation_config=config(), **more), want)
    model.generation_config.num_beams = 2
    one(text, generation_config=config())
    model.generation_config.num_beams = None
    unpatch_model(model)
    one(text, generation_config=config())
    assert one.outcomes["plain"] == 5 and len(one.prompts) == 0
    off = kept(patched_tiny(), max_bytes=0)
    off(text, generation_config=config())
    assert off.outcomes["plain"] == 1 and len(off.prompts) == 0


def test_a_refusal_is_counted_and_told_to_the_call():
    one = kept(patched_tiny())
    token = CALL.set(Call())
    with pytest.raises(UnsupportedModeError, match="fixed-size"):
        one(some(9), generation_config=config(cache_implementation="static"))
    assert isinstance(CALL.get().error, UnsupportedModeError)
    CALL.get().hang_up()
    with pytest.raises(ClientGone):
        one(some(9), generation_config=config())
    CALL.reset(token)
    assert one.outcomes == {"refused": 1, "stopped": 1, "plain": 1}


@pytest.mark.parametrize("score", ["key_norm", "snapkv"])
def test_where_tokens_are_evicted_a_prompt_is_kept_and_no_answer(score):
    model = tiny_model("llama", torch.float64)
    store = {"store": "evicted", "budget": {"share": 0.5}, "rule": {"score": score}}
    patch_model(model, config_for(model, "mixed", stores={"retrieval": store}))
    one, text = kept(model), some(150)
    out = one(text, generation_config=config())
    want = model.generate(text, generation_config=config())
    assert torch.equal(out, want) == (score == "snapkv"), "key_norm evicts once, before the last token is read"
    assert [len(prompt) for prompt in one.prompts._table.values()] == [150]
    again = one(text, generation_config=config())
    assert torch.equal(again, out) and one.prompts.hits == 1


def test_the_limit_holds_and_what_is_larger_is_answered():
    model = patched_tiny()
    one = kept(model, max_bytes=1)
    text = some(80)
    assert torch.equal(one(text, generation_config=config()), model.generate(text, generation_config=config()))
    assert len(one.prompts) == 0 and one.outcomes["kept"] == 1
    alone = kept(model)
    alone(text, generation_config=config())
    two = kept(model, max_bytes=2 * alone.prompts.nbytes)
    for _ in range(5):
        two(some(80), generation_config=config())
        assert two.prompts.nbytes <= two.max_bytes
    assert two.prompts.evicted > 3
