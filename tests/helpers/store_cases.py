"""Small settings of every store, for the tests that run over all of them."""

from __future__ import annotations

from helpers.tiny import config_for, tiny_model
from hf_longctx import patch_model
from hf_longctx.config.words import load, words

# What a store reads is what was written, but for those that say otherwise here.
ROUNDED = {"quantized"}
CASES = {
    "full": {"store": "full"},
    "sink_recent": {"store": "sink_recent", "sink": 4, "recent": 16},
    "compensated": {"store": "sink_recent_compensated", "sink": 4, "recent": 16},
    "compensated, growing": {"store": "sink_recent_compensated", "sink": 3, "recent": {"min": 9, "fraction": 0.3}},
    "8 bits": {"store": "quantized", "bits": 8, "group": 16, "residual": 8},
    "4 bits": {"store": "quantized", "bits": 4, "group": 16, "residual": 0},
    "offloaded": {"store": "offloaded", "page": 16, "recent": 20},
    "offloaded_disk": {"store": "offloaded_disk", "page": 16, "recent": 20},
}
WORDS = words("stores")


def role_of(case: str) -> str:
    (role,) = load("stores", CASES[case]["store"]).roles
    return role


def case_config(model, case: str, roles="mixed", **fields):
    """A config whose heads of the case's role keep what it says, but for these fields."""
    return config_for(model, roles, stores={role_of(case): CASES[case] | fields})


def patched_case(case: str, dtype, roles="mixed", family="llama", layers=3, **fields):
    model = tiny_model(family, dtype, layers=layers)
    return patch_model(model, case_config(model, case, roles, **fields))
