"""Small settings of every store, for the tests that run over all of them."""

from __future__ import annotations

import pytest

from helpers.cases import cases
from helpers.tiny import config_for, tiny_model
from hf_longctx import patch_model
from hf_longctx.config.words import build, load

CASES = {name: {"store": word, **fields} for name, (word, fields) in cases("stores").items()}
# For tests that are long where a store reads pages back: those of such stores run in the slow suite.
PAGED_SLOWLY = [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("offloaded")) for name in CASES]
SPECS = {name: load("stores", given["store"]) for name, given in CASES.items()}
BY_DATA = {case for case, given in CASES.items() if build("stores", given, "store", case).by_data}
ROUNDED = {case for case, spec in SPECS.items() if not spec.exact}


def role_of(case: str) -> str:
    (role,) = SPECS[case].roles
    return role


def case_config(model, case: str, roles="mixed", **fields):
    """A config whose heads of the case's role keep what it says, but for these fields."""
    return config_for(model, roles, stores={role_of(case): CASES[case] | fields})


def patched_case(case: str, dtype, roles="mixed", family="llama", layers=3, **fields):
    model = tiny_model(family, dtype, layers=layers)
    return patch_model(model, case_config(model, case, roles, **fields))
