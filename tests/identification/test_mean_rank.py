"""``mean_rank``: means of ranks, of methods that make sense together."""

from __future__ import annotations

import pytest
import torch
from helpers.method_cases import probe_of, run
from helpers.tiny import tiny_model

from hf_longctx import ConfigError
from hf_longctx.config.words import build, dump
from hf_longctx.identification.methods.echo_induction import EchoInduction
from hf_longctx.identification.methods.kvzip import Kvzip
from hf_longctx.identification.methods.mean_rank import MeanRank, ranks
from hf_longctx.identification.methods.query_focused import QueryFocused
from hf_longctx.identification.methods.two_needle import TwoNeedle

ECHO = {"method": "echo_induction", "tokens": 20}
NEEDLE = {"method": "two_needle", "length": 90, "facts": 2}


def made(*methods) -> MeanRank:
    return build("identification.methods", {"method": "mean_rank", "methods": list(methods)}, "method", "identify")


def test_equal_scores_have_the_mean_of_their_ranks():
    assert ranks(torch.tensor([[3.0, 1.0], [2.0, 9.0]])).tolist() == [[0.75, 0.25], [0.5, 1.0]]
    assert ranks(torch.tensor([[0.0, 0.0], [0.0, 9.0]])).tolist() == [[0.5, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("windowed", [(), (1,)])
def test_the_score_is_the_mean_of_the_ranks_of_the_methods(windowed):
    model = tiny_model(dtype=torch.float64)
    probe = probe_of(model, windowed=windowed)
    got = run(made(ECHO, NEEDLE), model, probe)
    alone = [run(m, model, probe_of(model, windowed=windowed)) for m in (EchoInduction(20), TwoNeedle(90, 2))]
    full = [i for i in range(3) if i not in windowed]
    torch.testing.assert_close(got[full], sum(ranks(one[full]) for one in alone) / 2, rtol=0, atol=1e-15)
    assert (got[list(windowed)] == 0).all() and got[full].min() > 0
    assert [one["method"] for one in probe.measured["methods"]] == ["echo_induction", "two_needle"]
    assert probe.measured["methods"][1]["length"] == 90 and len(probe.doubts) == 1  # a random model echoes nothing
    assert "echo_induction" in probe.doubts[0]


def test_words_mappings_and_objects_are_the_same():
    given = made("two_needle", ECHO)
    assert given == MeanRank((TwoNeedle(), EchoInduction(20))) == made(TwoNeedle(), ECHO)
    assert build("identification.methods", dump(given, "method"), "method", "identify") == given
    assert [type(one) for one in MeanRank().methods] == [TwoNeedle, QueryFocused, Kvzip]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "methods: got 0, expected at least two"),
        (("kvzip",), "methods: got 1, expected at least two"),
        (("kvzip", "kvzip"), "methods: one of them is given twice"),
        (("kvzip", {"method": "mean_rank"}), "methods: mean_rank cannot be one of its own methods"),
        (("kvzip", "two_needel"), "Did you mean 'two_needle'"),
        (("kvzip", {"method": "two_needle", "length": 3}), r"methods\[1\].length: got 3"),
        (("kvzip", 3), r"methods\[1\]: got 3, expected a mapping"),
    ],
)
def test_nonsense_is_refused(methods, message):
    with pytest.raises(ConfigError, match=message):
        made(*methods)
    with pytest.raises(ConfigError, match=message):
        MeanRank(methods)


def test_what_it_needs_is_what_its_methods_need():
    quiet = made(ECHO, {"method": "echo_induction", "tokens": 30})
    assert (quiet.needs_tokenizer, quiet.reads_documents, quiet.saves) == (False, False, False)
    loud = made(ECHO, "ablation")
    assert (loud.needs_tokenizer, loud.reads_documents, loud.saves) == (True, True, True)


@pytest.mark.parametrize(("value", "message"), [(0.0, "scored every head 0"), (float("nan"), "nan or inf")])
def test_a_method_that_ranks_nothing_is_refused(value, message, monkeypatch):
    monkeypatch.setattr(TwoNeedle, "scores", lambda self, probe: torch.full((3, 4), value).double())
    model = tiny_model()
    with pytest.raises(ConfigError, match=f"two_needle .*{message}|two_needle {message}"):
        run(made(ECHO, NEEDLE), model, probe_of(model))
