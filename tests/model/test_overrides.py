"""The keywords of patch_model and patched: explicit, complete, and an unknown one is an error that names them."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields

import pytest
from helpers.config_cases import refused
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxConfig, UnsupportedModelError, patch_model, patched, report
from hf_longctx.model.modules import state_of

pytestmark = pytest.mark.quick

SECTIONS = {
    "heads": {"roles": ["RRRR", "SSSS", "RSRS"]},
    "stores": {"streaming": {"recent": 8}},
    "prefill": {"min_tokens": 3},
    "decode": {"retrieval": {"select": "dense"}},
    "kernel": "stock",
    "model": {"fingerprint": {"vocab_size": None}},
}


def used(call, model, /, *given, **sections) -> LongCtxConfig:
    """The config in force after ``call``."""
    if call is patch_model:
        assert patch_model(model, *given, **sections) is model
        return state_of(model).config
    with patched(model, *given, **sections) as inside:
        assert inside is model
        return state_of(model).config


@pytest.mark.parametrize("call", [patch_model, patched])
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_a_keyword(call, name):
    model = tiny_model()
    config = config_for(model)
    assert used(call, model, config, **{name: SECTIONS[name]}) == config.override(**{name: SECTIONS[name]})
    assert used(call, model, config, **dict.fromkeys(SECTIONS)) == config, "None is not given"
    assert {field.name for field in fields(LongCtxConfig)} == set(SECTIONS)


@pytest.mark.parametrize("call", [patch_model, patched])
def test_the_model_and_the_config_may_be_keywords_as_well(call):
    model = tiny_model()
    config = config_for(model)
    if call is patch_model:
        assert patch_model(model=model, config=config, kernel="stock") is model
    else:
        with patched(model=model, config=config, kernel="stock"):
            assert state_of(model).config.kernel == "stock"
        return
    assert state_of(model).config == config.override(kernel="stock")


@pytest.mark.parametrize("call", [patch_model, patched])
def test_the_model_section_lets_a_config_fit(call):
    small = tiny_model()
    config = config_for(small).override(model={"fingerprint": {"vocab_size": 5}})
    refused(lambda: used(call, small, config), "fingerprint.vocab_size 5 (model: 97)")
    assert used(call, small, config, model=SECTIONS["model"]).model.fingerprint.vocab_size is None
    refused(lambda: used(call, small, config, model={"fingerprint": {"vocab": 1}}), "model.fingerprint.vocab: unknown")


@pytest.mark.parametrize("call", [patch_model, patched])
def test_an_unknown_keyword_names_the_known_ones(call):
    model = tiny_model()
    known = "is no keyword of it; known: config, model, heads, stores, prefill, decode, kernel."
    refused(lambda: used(call, model, config_for(model), stroes={}), f"{call.__name__}: 'stroes' {known}", "'stores'?")
    with pytest.raises(UnsupportedModelError, match="NoneType is no Transformers model"):
        used(call, None, "auto")


@pytest.mark.parametrize("call", [patch_model, patched])
def test_completion_and_type_checkers_see_the_sections(call):
    function = inspect.unwrap(call)
    hints = typing.get_type_hints(function)
    for name in ("heads", "stores", "prefill", "decode"):
        assert hints[name] == dict[str, typing.Any] | None
    assert hints["kernel"] == str | None
    kinds = {name: one.kind for name, one in inspect.signature(function).parameters.items()}
    assert all(kinds[name] is inspect.Parameter.KEYWORD_ONLY for name in SECTIONS if name != "model")


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_scaled_rope_is_said_in_the_log_and_in_the_report(kind, caplog):
    plain = config_for(tiny_model())
    model = tiny_model(rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0})
    said = f"rope_type {kind}: the heads were measured with rope_type default"
    patch_model(model, plain)
    assert said in caplog.text and said in str(report(model))
    assert said not in str(report(patch_model(model, config_for(model))))
    with patched(model, plain):
        assert said in str(report(model))
