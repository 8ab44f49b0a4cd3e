"""``model.full_attention_layers``: only the heads of these layers have roles."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from hf_longctx import ConfigError, LongCtxConfig
from hf_longctx.config.head_map import NONE

LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}


def described(**more) -> dict:
    return {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_layers": [1, 3], **SIZES, **more}


def config(heads: dict, **more) -> LongCtxConfig:
    model = {key: value for key, value in described(**more).items() if key != "hidden_size"}
    return LongCtxConfig.from_dict({"model": model, "heads": heads})


def test_describe_names_them_and_nothing_where_all_read_the_whole_text():
    hf_config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4, layer_types=LAYERS, **SIZES)
    assert LongCtxConfig.describe(hf_config)["full_attention_layers"] == [1, 3]
    assert "full_attention_layers" not in LongCtxConfig.describe(AutoConfig.for_model("qwen3", num_hidden_layers=4))


def test_a_multimodal_config_is_described_by_that_of_its_text():
    whole = AutoConfig.for_model("qwen2_vl", text_config={"num_hidden_layers": 5, "num_attention_heads": 4, **SIZES})
    assert LongCtxConfig.describe(whole) == LongCtxConfig.describe(whole.text_config)
    assert LongCtxConfig.describe(whole)["num_hidden_layers"] == 5


def test_only_their_heads_are_ranked_and_counted():
    scores = [[9.0, 9.0], [4.0, 1.0], [9.0, 9.0], [2.0, 3.0]]
    got = config({"scores": scores, "retrieval_fraction": 0.5, "confidence": "measured"})
    assert got.roles() == (NONE * 2, "RS", NONE * 2, "SR")
    assert (got.retrieval_heads, got.kv_heads, got.layers) == (2, 4, (1, 3))
    assert got.scores == ((4.0, 1.0), (2.0, 3.0))
    every = config({"scores": scores, "retrieval_fraction": 0.5, "confidence": "measured"}, full_attention_layers=None)
    assert every.roles() == ("RR", "SS", "RR", "SS")


def test_memory_is_that_of_their_heads():
    got = config({"roles": ["RR"] * 4})
    assert got.kv_bytes(1000)[0] == 2 * 4 * 1000 * 8 * 2
    assert got.kv_bytes(1000)[0] == got.kv_bytes(1000)[1]


def test_rows_of_other_layers_may_say_anything():
    assert config({"roles": ["--", "RS", "SS", "RR"]}).roles() == (NONE * 2, "RS", NONE * 2, "RR")


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_a_round_trip_keeps_the_roles(granularity):
    heads = {"scores": [[0.0, 0.0], [4.0, 1.0]] * 2, "retrieval_fraction": 0.5, "granularity": granularity}
    got = config({**heads, "confidence": "measured"})
    assert LongCtxConfig.from_dict(got.to_dict()) == got
    assert config({"roles": list(got.roles()), "granularity": granularity}).roles() == got.roles()


@pytest.mark.parametrize(
    ("heads", "model", "said"),
    [
        ({"roles": ["RR", "-R", "RR", "RR"]}, {}, r"heads.roles\[1\]: got '-R', expected only the letters R"),
        ({"roles": ["RR"] * 4, "dense_layers": [0]}, {}, r"dense_layers\[0\]: got 0, .*full_attention_layers \[1, 3\]"),
        ({"roles": ["RR"] * 4}, {"full_attention_layers": [3, 1]}, "full_attention_layers: got .*in order"),
        ({"roles": ["RR"] * 4}, {"full_attention_layers": [1, 1]}, "full_attention_layers: got .*once"),
        ({"roles": ["RR"] * 4}, {"full_attention_layers": [4]}, "full_attention_layers: got .*0 to 3"),
        ({"roles": ["RR"] * 4}, {"full_attention_layers": []}, "full_attention_layers: got"),
    ],
)
def test_what_cannot_be_is_refused(heads, model, said):
    with pytest.raises(ConfigError, match=said):
        config(heads, **model)


def test_a_model_with_others_is_another_model():
    hf_config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4, layer_types=LAYERS, **SIZES)
    config({"roles": ["RR"] * 4}).check_model(hf_config)
    config({"roles": ["RR"] * 4}, full_attention_layers=None).check_model(hf_config)
    with pytest.raises(ConfigError, match="full_attention_layers"):
        config({"roles": ["RR"] * 4}, full_attention_layers=[0, 3]).check_model(hf_config)
