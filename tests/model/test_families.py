"""Every record of patches/ that this Transformers has, on a tiny random model in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.every_family import CASES, ONE_EACH, in_float64, logits, stay_in_float64, tiny_model
from helpers.generation import MODES
from helpers.tiny import config_for, left_padded
from transformers import CONFIG_MAPPING, AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import hf_longctx.model.patch
from hf_longctx import (
    CacheError,
    Family,
    LongCtxCache,
    LongCtxConfig,
    UnsupportedModeError,
    UnsupportedModelError,
    identify,
    patch_model,
    unpatch_model,
)
from hf_longctx.cache.fingerprint import fingerprint
from hf_longctx.cache.seam import CACHE
from hf_longctx.model.attention import KNOWN
from hf_longctx.model.family import find_family
from hf_longctx.model.modules import attention_modules, language_model, state_of

STEPS = (33, 40, 41, 42, 60)  # one shot, an odd chunk, two tokens, a chunk beyond the windows; at last a token
WITH_ROLES = [case for case in CASES if not case.window or find_family(case.model_type).sliding == "layer_types"]
MOSTLY_SLOW = [
    pytest.param(case, marks=() if case.model_type in ONE_EACH else pytest.mark.slow, id=str(case)) for case in CASES
]


@pytest.fixture(autouse=True)
def _float64(monkeypatch):
    stay_in_float64(monkeypatch)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([61, 45])


def check_equals_eager(case, kernel) -> None:
    """A left-padded batch equals its sequences alone: of padded ones eager attention gives NaN in float64."""
    model = tiny_model(case)
    ids, mask = padded()
    want = [logits(model, ids[i : i + 1, start:], mask[i : i + 1, start:])[0] for i, start in enumerate((0, 16))]
    assert want[0].isfinite().all() and (want[0][-1] - want[1][-1]).abs().max() > 1e-3
    patch_model(model, config_for(model, "retrieval", kernel=kernel))
    for got in (logits(model, ids, mask, STEPS, LongCtxCache(model)), logits(model, ids, mask)):
        assert (got[0] - want[0]).abs().max() < 1e-10
        assert (got[1, 16:] - want[1]).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_heads_retrieval_equals_eager(case):
    check_equals_eager(case, "auto")


@pytest.mark.parametrize("case", MOSTLY_SLOW)
def test_all_heads_retrieval_equals_eager_by_the_definition(case):
    check_equals_eager(case, "reference")


@pytest.mark.parametrize("case", MOSTLY_SLOW)
def test_every_attention_call_equals_the_dense_mask(case, shadow):
    """The control: windows, of the heads and of the model, that are one token shorter."""
    model = tiny_model(case)
    config = config_for(model, "mixed", 2, 7)
    patch_model(model, config)
    right, control = shadow(config), shadow(config, recent_off_by=1)
    logits(model, *padded(), STEPS, LongCtxCache(model))
    layers = [plan.layer_idx for plan in state_of(model).plans]
    assert sorted(right.errors) == sorted(control.errors) == layers
    assert right.calls == (len(STEPS) + 1) * len(layers)
    assert right.error <= 1e-12
    assert min(control.errors.values()) > 1e-4


# What its attention hands to the attention function.

SPY = "keywords_of_a_family"


def calls_of(model) -> list[dict]:
    """What each layer's attention function is given in one forward of the plain model, ``mask`` the mask's window."""
    seen = []

    def spy(module, query, key, value, attention_mask, **given):
        seen.append({"layer": module.layer_idx, "shapes": [x.shape[1::2] for x in (query, key, value)]})
        seen[-1] |= {"mask": attention_mask[0], "given": given}
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register(SPY, spy)
    AttentionMaskInterface.register(SPY, lambda *args, **given: (given.get("local_size"),))
    model.set_attn_implementation(SPY)
    logits(model, *left_padded([20]))
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_attention_passes_what_the_record_says(case):
    """No keyword but those that are known or mapped, not even as None; the windows and heads are the described ones."""
    model = tiny_model(case)
    family = find_family(case.model_type)
    described = LongCtxConfig.describe(model.config)
    heads = [described[name] for name in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    seen = calls_of(model)
    assert [call["layer"] for call in seen] == [
        one.layer_idx for one in attention_modules(language_model(model), family)
    ]
    seen = [call for call in seen if family.has_roles(language_model(model).config, call["layer"])]
    for call in seen:
        window = family.window(language_model(model).config, call["layer"])
        names = call["given"].keys() - {"scaling", "dropout"}
        assert names <= KNOWN | family.scores.keys()
        assert family.scores.keys() <= names
        assert call["given"].get("sliding_window", window) == call["mask"] == window
        assert case.window or window is None
        assert call["shapes"] == [(count, described["head_dim"]) for count in heads]


BOTH_WAYS = [case for case in CASES if hasattr(CONFIG_MAPPING[case.model_type], "use_bidirectional_attention")]


@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
def test_a_model_that_reads_both_ways_is_refused(case):
    """As the text models of embeddings and of PaliGemma do; the mask of some does not tell."""
    model = tiny_model(case)
    model.config.use_bidirectional_attention = True
    patch_model(model, config_for(model, "retrieval"))
    with pytest.raises(UnsupportedModeError, match="use_bidirectional_attention=True in the config"):
        logits(model, *left_padded([20]))
    model.config.use_bidirectional_attention = None
    logits(model, *left_padded([20]))


WITH_SCORES = [case for case in CASES if find_family(case.model_type).scores]


@pytest.mark.parametrize("case", WITH_SCORES, ids=str)
def test_a_record_that_does_not_map_the_keyword_is_refused(case, monkeypatch):
    family = find_family(case.model_type)
    monkeypatch.setattr(hf_longctx.model.patch, "find_family", lambda name: Family(name, sliding=family.sliding))
    model = tiny_model(case)
    patch_model(model, config_for(model, "retrieval"))
    with pytest.raises(UnsupportedModelError, match=f"asks its attention function for {next(iter(family.scores))}"):
        logits(model, *left_padded([20]))


@pytest.mark.parametrize("case", WITH_SCORES, ids=str)
def test_the_mapped_field_changes_the_answer(case):
    """A control: the same weights without the softcap or the sinks answer otherwise."""
    model, (ids, mask) = tiny_model(case), left_padded([30])
    patch_model(model, config_for(model, "retrieval"))
    want = logits(model, ids, mask)
    for layer in language_model(model).layers:
        if "softcap" in find_family(case.model_type).scores.values():
            layer.self_attn.attn_logit_softcapping = 1e6
        else:
            layer.self_attn.sinks.data.fill_(-1e6)
    assert (logits(model, ids, mask) - want).abs().max() > 1e-3


# A patched model's life.


DRAFTS = ("prompt lookup", "assisted")


def sequences(model, mode: str, **more) -> torch.Tensor:
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (1 if mode in DRAFTS else 2, 23))
    ids[:, 12:22] = ids[:, :10]  # for the lookups
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **MODES.get(mode, {}), **more)


def modes() -> list:
    quick = ("greedy", "beams")
    return [
        pytest.param(case, mode, id=f"{case}-{mode}", marks=() if quick_one else pytest.mark.slow)
        for case in CASES
        for mode in (*MODES, "assisted")
        for quick_one in [case.model_type in ONE_EACH and mode in quick]
    ]


@pytest.mark.parametrize(("case", "mode"), modes())
def test_generate_gives_stock_tokens(case, mode):
    model = tiny_model(case)
    more = {"assistant_model": tiny_model(case)} if mode == "assisted" else {}
    whole = model.config.get_text_config() is not model.config
    fails = (mode in DRAFTS and model._is_stateful) or (mode == "guided" and whole)
    if fails:  # in Transformers as well: a state cannot be rolled back, and a multimodal model is not guided
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError), match="stateful|[Ss]ize|shapes|goes on at position"):
                sequences(model, mode, **more)
            patch_model(model, config_for(model, "retrieval"))
        return
    want = sequences(model, mode, **more)
    patch_model(model, config_for(model, "retrieval"))
    assert torch.equal(sequences(model, mode, **more), want)


@pytest.mark.parametrize("case", MOSTLY_SLOW)
def test_save_reload_and_unpatch(case, tmp_path):
    model, (ids, mask) = tiny_model(case), left_padded([40])
    original, dense = model.config, logits(model, ids, mask)
    patch_model(model, config_for(model, "mixed", 2, 7))
    want = logits(model, ids, mask)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    in_float64(loaded)
    language_model(loaded).config._experts_implementation = "eager"
    patch_model(loaded)
    # not bit-equal: on some CPUs the experts' rounding depends on where their weights lie in memory
    assert (logits(loaded, ids, mask) - want).abs().max() < 1e-10
    unpatch_model(model)
    assert model.config is original and language_model(model).config is original.get_text_config()
    assert torch.equal(logits(model, ids, mask), dense)
    assert case not in WITH_ROLES or (want - dense).abs().max() > 1e-6, "the roles must matter, or this shows nothing"


@pytest.mark.parametrize("case", MOSTLY_SLOW)
def test_a_saved_cache_goes_on_and_another_models_is_refused(case, tmp_path):
    model, (ids, mask) = tiny_model(case), left_padded([40])
    assert fingerprint(language_model(model))["weights"] != fingerprint(language_model(tiny_model(case)))["weights"]
    patch_model(model, config_for(model, "mixed", 2, 7))
    cache = LongCtxCache(model)
    logits(model, ids[:, :33], mask[:, :33], cache=cache)
    cache.save(tmp_path / "cache", ids=ids[:, :33])  # which a multimodal model does not hand on
    want = logits(model, ids, mask, STEPS[:1], LongCtxCache(model))[:, 33:]
    loaded = LongCtxCache.load(tmp_path / "cache", model)
    with torch.no_grad():
        got = model(ids[:, 33:], attention_mask=mask, **{CACHE: loaded}).logits
    assert (got - want).abs().max() < 1e-10
    other = tiny_model(case)
    patch_model(other, config_for(other, "mixed", 2, 7))
    with pytest.raises(CacheError, match="weights"):
        LongCtxCache.load(tmp_path / "cache", other)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_ROLES, ids=str)
def test_identify_measures_it(case):
    model = tiny_model(case)
    plans = state_of(patch_model(model, config_for(model))).plans
    found = identify(model, None, "echo_induction", tokens=16, copies=2, sink=2, recent=7)
    found.check_model(model.config)
    scores = [row for row in found.heads.scores if any(row)]
    assert len(scores) == len([plan for plan in plans if plan.window is None])
