"""What the tests of configs share: a small valid config, a model that it fits, shipped configs, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import yaml

from hf_longctx.config.config import LongCtxConfig
from hf_longctx.errors import ConfigError

SCORES = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]]
FINGERPRINT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "rope_theta": 5e5,
    "rope_type": "llama3",
}
TABLE = {"budgets": [{"pattern": "dense"}], "map": [[0, 0, 0, 0]] * 3, "source": {"from": "x"}}


def plain(**changes) -> dict:
    """A small valid config; ``changes`` replace sections."""
    model = {"ids": ["org/Tiny-1B"], "model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4}
    model |= {"num_key_value_heads": 2, "head_dim": 16, "fingerprint": dict(FINGERPRINT)}
    return {"model": model, "heads": {"scores": copy.deepcopy(SCORES)}, **changes}


def whole() -> dict:
    """A valid config that has every key."""
    other = {"source": {"method": "b"}, "roles": ["RR", "SS", "SS"]}
    heads = {"source": {"method": "a", "n": [1, 2.5, None, True]}, "scores": SCORES, "kv_budget": 0.6}
    heads |= {"dense_layers": [2], "balance": 2, "confidence": "low", "alternatives": {"kvzip.score": other}}
    stores = {"retrieval": {"store": "full"}, "streaming": {"store": "sink_recent", "sink": 3, "recent": 5}}
    prefill = {"min_tokens": 7, "retrieval": {"table": "m"}, "tables": {"m": TABLE}, "share_groups": True}
    return plain(heads=heads, stores=stores, prefill=prefill, decode={"retrieval": {"select": "dense"}}, kernel="stock")


def config(**heads) -> LongCtxConfig:
    return LongCtxConfig.from_dict(plain(heads={"scores": SCORES, **heads}))


def hf(**changes) -> SimpleNamespace:
    """What Transformers 5 has for the model of ``plain``."""
    facts = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    facts |= {"head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000}
    rope = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}}
    return SimpleNamespace(**{**facts, **rope, **changes})


def ship(folder, name: str, **changes) -> None:
    data = plain()
    data["model"] |= changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def refused(call, *fragments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    return str(caught.value)


def write(path, text: str):
    path.write_text(text)
    return path
