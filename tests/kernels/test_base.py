"""Which kernel runs: by the folder's listing, by preference, by what it says it supports; never silently another."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_longctx import errors
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import cpu, reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import All, Averaged, Causal, Window
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

CASE = {"device": torch.device("cpu"), "dtype": torch.float64, "head_dim": 64, "needs_grad": False}


@pytest.fixture
def extra_kernel(monkeypatch):
    """Adds a kernel module of the given preference that supports only bfloat16."""

    def add(name, preference):
        module = ModuleType(f"hf_longctx.kernels.{name}")
        module.NAME, module.PREFERENCE = name, preference
        module.READS = frozenset({Causal})
        module.supports = lambda case: None if case.dtype == torch.bfloat16 else "only bfloat16"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        listed = (*dispatch.names(), name)
        monkeypatch.setattr(dispatch, "names", lambda: listed)
        return module

    return add


def test_names_are_the_files():
    folder = Path(dispatch.__file__).parent
    files = {path.stem for path in folder.glob("[!_]*.py")} - {"layout", "dispatch", "base"}
    assert set(dispatch.names()) == files
    assert {"cpu", "reference"} <= files


def test_every_kernel_keeps_the_contract():
    for name, kernel, failure in dispatch._candidates(dispatch.names()):
        assert failure is None and name == kernel.NAME
        assert {All, Causal, Window, Averaged, BlockList} >= kernel.READS and kernel.READS
        assert list(inspect.signature(kernel.supports).parameters) == ["case"]
        parameters = inspect.signature(kernel.attend).parameters
        assert list(parameters) == ["q", "segments", "reads", "scores", "want_lse"]
        assert parameters["want_lse"].default is True
        assert list(inspect.signature(getattr(kernel, "preference", lambda case: 0)).parameters) == ["case"]
    assert {All, Causal, Window, Averaged, BlockList} == reference.READS


def test_auto_takes_the_fast_kernel_and_a_word_the_one_it_names():
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu
    assert dispatch.pick("auto", dispatch.Case(**{**CASE, "needs_grad": True, "dtype": torch.float64})) is cpu
    assert dispatch.pick("reference", dispatch.Case(**CASE)) is reference
    assert cpu.PREFERENCE > reference.PREFERENCE


def test_auto_prefers_by_number_among_those_that_support_the_case(extra_kernel):
    fast = extra_kernel("zz_fast", 50)
    assert dispatch.pick("auto", dispatch.Case(**{**CASE, "dtype": torch.bfloat16})) is fast
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu


def test_a_preference_of_its_own_counts_for_the_case_alone(extra_kernel):
    """Asked only of cases that are supported, and not where another kernel is preferred anyway."""
    fast, other = extra_kernel("zz_fast", 50), extra_kernel("zz_other", 40)
    asked = []
    fast.preference = lambda case: asked.append(case) or (39 if case.head_dim == 64 else 50)
    other.preference = lambda case: asked.append(case) or 40
    wide, narrow = (dispatch.Case(CASE["device"], torch.bfloat16, dim) for dim in (64, 32))
    assert dispatch.pick("auto", wide) is other and asked == [wide, wide]
    assert dispatch.pick("auto", narrow) is fast and asked == [wide, wide, narrow]
    assert dispatch.pick("zz_fast", wide) is fast, "a kernel that is named runs"
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu and len(asked) == 4
    other.supports = lambda case: "not today"
    assert dispatch.pick("auto", wide) is fast, "39 is more than cpu's"
    fast.preference = lambda case: 9
    assert dispatch.pick("auto", wide) is not fast


def test_a_named_kernel_that_cannot_is_an_error_that_says_what_works(extra_kernel):
    extra_kernel("zz_fast", 50)
    with pytest.raises(errors.UnsupportedModeError, match=r"zz_fast.*float64.*only bfloat16.*auto or one of: cpu"):
        dispatch.pick("zz_fast", dispatch.Case(**CASE))


def test_a_kernel_that_computes_no_such_reads_is_passed_over(extra_kernel):
    fast = extra_kernel("zz_fast", 50)
    case = dispatch.Case(CASE["device"], torch.bfloat16, 64, reads=BlockList)
    assert dispatch.pick("auto", case) is not fast
    with pytest.raises(errors.UnsupportedModeError, match=r"zz_fast: computes no BlockList.*one of:.*reference"):
        dispatch.pick("zz_fast", case)
    forward = Forward(Rows(1, 0, 1))
    assert dispatch.choose("zz_fast", case, forward) is dispatch.pick("auto", case), "in a model another one runs"
    assert "zz_fast" not in forward.log.used
    fast.READS = frozenset({Causal, BlockList})
    assert dispatch.pick("auto", case) is dispatch.choose("zz_fast", case, Forward(Rows(1, 0, 1))) is fast


def test_a_kernel_that_lacks_reads_is_refused_early(extra_kernel):
    fast = extra_kernel("zz_fast", 50)
    for word in ("auto", "stock", "reference", "zz_unknown"):
        dispatch.require(word, BlockList, "it")
    with pytest.raises(errors.UnsupportedModeError, match=r"it needs.*BlockList.*'zz_fast'.*one of:.*reference"):
        dispatch.require("zz_fast", BlockList, "it")
    fast.READS = frozenset({BlockList})
    dispatch.require("zz_fast", BlockList, "it")


def test_a_kernel_that_cannot_be_imported_is_skipped_by_auto_and_named_in_the_error(monkeypatch):
    listed = (*dispatch.names(), "zz_missing")
    monkeypatch.setattr(dispatch, "names", lambda: listed)
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu
    with pytest.raises(errors.UnsupportedModeError, match="cannot be imported"):
        dispatch.pick("zz_missing", dispatch.Case(**CASE))


@pytest.mark.parametrize("name", ["first_bias", "sinks"])
def test_a_gradient_of_scores_alone_is_not_lost(name):
    """As where all weights are frozen and only a bias by head is learnt."""
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    own, grads = torch.zeros(4, requires_grad=True), []
    for word in ("auto", "reference"):
        scores = Scores(0.3, **{name: own})
        out, _ = dispatch.attend(word, q, [Segment(k, k, 5)], Causal(), scores, Forward(Rows(1, 0, 5)))
        grads += torch.autograd.grad(out.square().sum(), own)
    assert torch.allclose(*grads, atol=1e-5) and grads[0].abs().min() > 1e-3


def test_no_kernel_for_integers():
    with pytest.raises(errors.UnsupportedModeError, match="floating point"):
        dispatch.pick("auto", dispatch.Case(**{**CASE, "dtype": torch.int32}))


@pytest.mark.parametrize(
    ("word", "near"), [("refrence", "reference"), ("CPU", "known"), ("layout", "known"), ("../cpu", "cpu")]
)
def test_an_unknown_word_is_a_config_error(word, near):
    with pytest.raises(errors.ConfigError, match=near):
        dispatch.pick(word, dispatch.Case(**CASE))
