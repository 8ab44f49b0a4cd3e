"""PEFT methods that add virtual tokens, patched before and after: they run as on the stock model, or are named."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import config_for, left_padded, tiny_model
from peft import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from hf_longctx import (
    LongCtxCache,
    PromptCache,
    UnsupportedModeError,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
)
from hf_longctx.cache.seam import CACHE

SHARED = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
KINDS = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**SHARED),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**SHARED),
    "P_TUNING": lambda: PromptEncoderConfig(encoder_hidden_size=16, **SHARED),
    "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(num_tasks=2, **SHARED),
}
IDS, MASK = left_padded([40, 25])


def tuned(kind: str, when: str | None, roles="retrieval"):
    """A tiny model with prompt learning, patched ``before`` PEFT, ``after``, or never."""
    torch.manual_seed(0)
    model = tiny_model()
    if when == "before":
        patch_model(model, config_for(model, roles))
    torch.manual_seed(1)
    wrapped = get_peft_model(model, KINDS[kind]()).eval()
    return patch_model(wrapped, config_for(model, roles)) if when == "after" else wrapped


def tasks(kind: str, rows: int) -> dict:
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if kind.startswith("MULTI") else {}


# Whether this PEFT finds the cache that this Transformers gives it. Where it does not, stock models answer wrongly.
KNOWS_THE_CACHE = CACHE in PeftModelForCausalLM.prepare_inputs_for_generation.__code__.co_consts


@torch.no_grad()
def without_a_cache(model, input_ids, **given):
    """Greedy tokens after ``input_ids``, the whole text read for each: what no version can get wrong."""
    mask = given.pop("attention_mask", torch.ones_like(input_ids))
    for _ in range(5):
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **given).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask[:, -1:]], 1)
    return input_ids


def test_the_stock_model_is_right_where_the_cache_is_known():
    model, given = tuned("PROMPT_TUNING", None), {"input_ids": IDS[:1]}
    same = torch.equal(model.generate(max_new_tokens=5, **given), without_a_cache(model, **given))
    assert same is KNOWS_THE_CACHE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_one_row_is_that_of_the_stock_model(kind, when):
    stock, model = tuned(kind, None), tuned(kind, when)
    given = {"input_ids": IDS[:1], **tasks(kind, 1)}
    torch.testing.assert_close(model(**given).logits, stock(**given).logits)
    even = {"input_ids": IDS[:, -20:], "attention_mask": MASK[:, -20:], **tasks(kind, 2)}
    for asked in (given, even):
        want, said = without_a_cache(stock, **asked), f"PEFT's {kind} puts 5 virtual tokens"
        for use_cache, right in ((True, KNOWS_THE_CACHE), (False, kind != "PREFIX_TUNING")):
            if right:
                assert torch.equal(model.generate(max_new_tokens=5, use_cache=use_cache, **asked), want)
            else:
                with pytest.raises(
                    UnsupportedModeError, match=f"{said}.*{'asks generate' if use_cache else 'Set use'}"
                ):
                    model.generate(max_new_tokens=5, use_cache=use_cache, **asked)
    unpatch_model(model)
    assert torch.equal(model.generate(max_new_tokens=5, **given), stock.generate(max_new_tokens=5, **given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_left_padded_batch_names_the_virtual_tokens(kind, when):
    model, given = tuned(kind, when), {"input_ids": IDS, "attention_mask": MASK, **tasks(kind, 2)}
    for asked in ({}, {"use_cache": False}):
        with pytest.raises(UnsupportedModeError, match=f"PEFT's {kind} puts 5 virtual tokens"):
            model.generate(max_new_tokens=3, **given, **asked)
    with pytest.raises(UnsupportedModeError, match="virtual tokens"):
        model(**given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_prompt_cache_refuses(kind, when):
    model = tuned(kind, when)
    for one in (model, torch.compile(model, backend="eager")):
        with pytest.raises(UnsupportedModeError, match=f"PromptCache: PEFT's {kind} puts 5 virtual tokens"):
            PromptCache(one)
    inner = PromptCache(model.get_base_model()).prefill(IDS[0])
    assert len(inner.ask([[5, 6]], max_new_tokens=2)[0]) == 2, "without the wrapper there are none"


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_cache_of_the_users_own_holds_them(kind):
    model, stock = tuned(kind, "after", "mixed"), tuned(kind, "after", "mixed")
    cache = LongCtxCache(model)
    with torch.no_grad():
        first = model(IDS[:1], past_key_values=cache).logits
    assert cache.get_seq_length() == 45
    torch.testing.assert_close(first, stock(IDS[:1]).logits)


def adapted(patch: str | None, roles: str):
    torch.manual_seed(0)
    model = tiny_model(group=1, head_dim=4)  # PEFT takes hidden_size for all query heads
    if patch == "before":
        patch_model(model, config_for(model, roles))
    torch.manual_seed(1)
    wrapped = get_peft_model(model, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=4))
    for name, parameter in wrapped.named_parameters():
        if "gate" in name:
            parameter.data.fill_(0.7)
    return wrapped.eval()


def test_adaption_prompts_around_a_patched_model():
    stock, model = adapted(None, "retrieval"), adapted("before", "retrieval")
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5}
    assert torch.equal(model.generate(**given), stock.generate(**given))
    mixed = adapted("before", "mixed")
    whole = torch.cat([IDS[0], torch.tensor([5, 6, 7])])
    want = mixed.generate(input_ids=whole[None], max_new_tokens=4)[0, 43:].tolist()
    assert PromptCache(mixed).prefill(IDS[0]).ask([[5, 6, 7]], max_new_tokens=4) == [want]
    with pytest.raises(UnsupportedModelError, match="AdaptedAttention.*Call patch_model first"):
        patch_model(adapted(None, "mixed"), config_for(tiny_model(group=1, head_dim=4)))
