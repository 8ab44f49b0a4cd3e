"""Scores become roles by one rule, whatever process asks."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from hf_longctx.config.head_map import assign, given, heads_in_budget, slice_roles, usable_cuts, usable_fraction
from hf_longctx.errors import ConfigError


def table(layers: int = 6, width: int = 8, seed: int = 0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(width)] for _ in range(layers)]


def count(roles: tuple[str, ...]) -> int:
    return "".join(roles).count("R")


def refused(call, *fragments: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def test_best_scores_first():
    assert assign([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]], fraction=0.5) == ("SR", "RS", "SR")
    assert assign([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]], fraction=1 / 6) == ("SR", "SS", "SS")


@pytest.mark.parametrize(
    ("fraction", "heads"), [(0, 0), (1, 48), (0.5, 24), (0.0104, 0), (0.0105, 1), (0.99, 48), (0.98, 47)]
)
def test_fraction_rounds_to_the_nearest(fraction, heads):
    assert count(assign(table(), fraction=fraction)) == heads


def test_a_half_goes_up_in_decimal_arithmetic():
    assert 0.29 * 50 < 14.5
    assert count(assign(table(5, 10), fraction=0.29)) == 15
    assert count(assign(table(5, 10), fraction=0.28)) == 14
    assert count(assign(table(5, 2), fraction=0.25)) == 3


def test_ties_lower_layer_then_lower_head():
    scores = [[0.5, 0.7], [0.5, 0.5], [0.7, 0.5]]
    assert assign(scores, fraction=0.5, confidence="measured") == ("RR", "SS", "RS")
    assert assign(scores, fraction=4 / 6, confidence="low") == ("RR", "RS", "RS")


def test_same_answer_however_often_asked():
    scores = [[round(x, 1) + 0.1 for x in row] for row in table(20, 8)]
    assert len({assign(scores, fraction=0.37) for _ in range(5)}) == 1


ZEROS = [[0.9, 0.0], [0.0, 0.8], [0.0, 0.0]]


@pytest.mark.parametrize("confidence", ["measured", "low", "none"])
@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_cut_among_zeros_is_refused(confidence, fraction):
    refused(
        lambda: assign(ZEROS, fraction=fraction, confidence=confidence),
        "equal scores of 0.0",
        "largest usable retrieval_fraction: 0.333333 (or 1.0",
    )


@pytest.mark.parametrize(("fraction", "heads"), [(0, 0), (0.333333, 2), (0.2, 1), (1.0, 6)])
def test_no_cut_among_zeros_no_error(fraction, heads):
    assert count(assign(ZEROS, fraction=fraction, confidence="none")) == heads


def test_minus_zero_is_zero():
    refused(lambda: assign([[0.0, -0.0]], fraction=0.5), "largest usable retrieval_fraction: 0.0")


def test_other_equal_scores_are_refused_only_without_confidence():
    scores = [[0.7, 0.7], [0.7, 0.1]]
    assert count(assign(scores, fraction=0.5, confidence="low")) == 2
    refused(lambda: assign(scores, fraction=0.5, confidence="none"), "3 equal scores of 0.7", "0.0 (or 0.75")
    assert count(assign(scores, fraction=0.75, confidence="none")) == 3


def test_usable_fraction_counts_dense_layers_and_is_usable():
    scores = [[0.0, 0.0], [0.9, 0.0], [0.0, 0.0]]
    refused(lambda: assign(scores, fraction=5 / 6, dense_layers=[0]), "largest usable retrieval_fraction: 0.5 (")
    assert assign(scores, fraction=0.5, dense_layers=[0]) == ("RR", "RS", "SS")
    assert assign(scores, fraction=0.1, dense_layers=[0]) == ("RR", "SS", "SS")
    assert assign(scores, fraction=1.0, dense_layers=[0]) == ("RR", "RR", "RR")


def test_budget_cut_among_zeros_is_refused():
    refused(lambda: assign(ZEROS, kv_budget=0.6, streaming_tokens=320), "largest usable retrieval_fraction: 0.333333")


def test_dense_layers_count_towards_the_fraction():
    scores = [[0.1, 0.2], [0.9, 0.8], [0.7, 0.3]]
    assert assign(scores, fraction=0.5, dense_layers=[0]) == ("RR", "RS", "SS")
    assert assign(scores, fraction=0.0, dense_layers=[0, 2]) == ("RR", "SS", "RR")
    assert assign(scores, fraction=0.5) != assign(scores, fraction=0.5, dense_layers=[0])


@pytest.mark.parametrize("balance", [2, 4, 8])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_balance_gives_every_slice_equally_many(balance, fraction):
    scores = table()
    roles = assign(scores, fraction=fraction, balance=balance)
    for row in roles:
        assert len({slice_roles(row, rank, balance).count("R") for rank in range(balance)}) == 1
    wanted = math.floor(fraction * 48 + 0.5)
    assert abs(count(roles) - wanted) <= balance / 2
    assert assign(scores, fraction=fraction) != roles


def test_balance_takes_the_best_of_every_slice():
    scores = [[0.9, 0.8, 0.1, 0.2], [0.5, 0.4, 0.3, 0.6]]
    assert assign(scores, fraction=0.25) == ("RRSS", "SSSS")
    assert assign(scores, fraction=0.5, balance=2) == ("RSSR", "RSSR")


def test_balance_keeps_the_highest_sum_of_scores():
    scores = table(2, 4, seed=3)
    best = max(
        (sum(s for row, r in zip(scores, pair, strict=True) for s, letter in zip(row, r, strict=True) if letter == "R"))
        for pair in balanced_pairs()
    )
    roles = assign(scores, fraction=0.5, balance=2)
    kept = sum(
        s for row, r in zip(scores, roles, strict=True) for s, letter in zip(row, r, strict=True) if letter == "R"
    )
    assert kept == pytest.approx(best)


def balanced_pairs() -> list[tuple[str, str]]:
    rows = ["".join("R" if bits >> i & 1 else "S" for i in range(4)) for bits in range(16)]
    rows = [row for row in rows if row[:2].count("R") == row[2:].count("R")]
    return [(a, b) for a in rows for b in rows if (a + b).count("R") == 4]


def test_granularity_layer():
    scores = [[0.9, 0.1], [0.6, 0.6], [0.0, 0.3], [0.2, 0.3]]
    assert assign(scores, fraction=0.5, granularity="layer") == ("RR", "RR", "SS", "SS")
    assert assign(scores, fraction=0.25, granularity="layer") == ("SS", "RR", "SS", "SS")
    assert assign(scores, fraction=0.25) == ("RS", "RS", "SS", "SS")


def bytes_share(retrieval: int, total: int, tokens: int, kept: int) -> float:
    return (retrieval * tokens + (total - retrieval) * min(kept, tokens)) / (total * tokens)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.25, 0.5, 0.505, 0.99, 1.0])
@pytest.mark.parametrize(("tokens", "kept"), [(32768, 320), (4096, 17)])
def test_budget_is_the_largest_that_fits(budget, tokens, kept):
    heads = heads_in_budget(budget, 256, tokens, kept) if budget > kept / tokens else 0
    assert bytes_share(heads, 256, tokens, kept) <= max(budget, kept / tokens)
    assert heads == 256 or bytes_share(heads + 1, 256, tokens, kept) > budget
    if budget > kept / tokens:
        assert count(assign(table(32, 8), kv_budget=budget, kv_budget_tokens=tokens, streaming_tokens=kept)) == heads


def test_budget_that_nothing_fits_names_the_smallest():
    call = lambda budget: assign(table(), kv_budget=budget, kv_budget_tokens=1000, streaming_tokens=320)  # noqa: E731
    refused(lambda: call(0.3), "heads.kv_budget: got 0.3", "320 tokens", "smallest: 0.32.")
    assert count(call(0.32)) == 0


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.5, 0.6])
def test_a_budget_counts_the_bytes_of_packed_retrieval_heads(budget):
    form = (256, 1000, Fraction(40), Fraction(1000, 2))
    heads = heads_in_budget(budget, *form)
    shares = [(count * 500 + (256 - count) * 40) / 256_000 for count in range(257)]
    assert heads == max(count for count, share in enumerate(shares) if share <= budget)
    made = {"kv_budget": budget, "kv_budget_tokens": 1000, "streaming_tokens": 40, "retrieval_tokens": 500}
    assert count(assign(table(32, 8), **made)) == heads
    if budget < 0.5:
        assert heads > heads_in_budget(budget, 256, 1000, 40)
    # Quantised tokens that take less than a window: nothing is cheaper than all of them.
    assert heads_in_budget(0.2, 256, 1000, 400, 200) == 256
    refused(lambda: heads_in_budget(0.19, 256, 1000, 400, 200), "smallest: 0.2.")


def test_budget_below_the_window():
    refused(lambda: heads_in_budget(0.9, 48, 100, 320), "smallest: 1.0")
    assert heads_in_budget(1.0, 48, 100, 320) == 48


def test_budget_holds_with_dense_layers_and_balance():
    form = {"kv_budget_tokens": 1000, "streaming_tokens": 100}
    refused(lambda: assign(table(2, 8), kv_budget=0.5, dense_layers=[0], **form), "dense_layers", "smallest: 0.55.")
    assert assign(table(2, 8), kv_budget=0.55, dense_layers=[0], **form) == ("R" * 8, "S" * 8)
    roles = assign(table(), kv_budget=0.5, balance=4, **form)
    assert bytes_share(count(roles), 48, 1000, 100) <= 0.5
    assert bytes_share(count(roles) + 4, 48, 1000, 100) > 0.5


@pytest.mark.parametrize(
    ("scores", "extra", "fragment"),
    [
        ([], {}, "equal rows"),
        ([[]], {}, "equal rows"),
        ([[0.1], [0.2, 0.3]], {}, "rows of [1, 2]"),
        ([[0.1, math.nan]], {}, "nan or inf"),
        ([[0.1, math.inf]], {}, "nan or inf"),
        ([[0.1, 0.2]], {"dense_layers": [0, 1]}, "heads.dense_layers[1]: got 1, expected a layer from 0 to 0"),
        ([[0.1, 0.2]], {"dense_layers": [-1]}, "heads.dense_layers[0]: got -1"),
        ([[0.1, 0.2]], {"balance": 3}, "heads.balance: got 3, expected a divisor of the 2 KV heads"),
        ([[0.1, 0.2]], {"balance": 0}, "heads.balance: got 0"),
        ([[0.1, 0.2]], {"kv_budget": 0.5}, "exactly one"),
    ],
)
def test_assign_refuses(scores, extra, fragment):
    refused(lambda: assign(scores, fraction=0.5, **extra), fragment)


def test_given_roles():
    assert given(["RSSR", "SSSS"]) == ("RSSR", "SSSS")
    assert given(["RSSR", "SSSS"], dense_layers=[1], balance=2) == ("RSSR", "RRRR")
    assert given(["RRRR", "SSSS"], granularity="layer") == ("RRRR", "SSSS")
    refused(lambda: given(["RX"]), "heads.roles[0]: got 'RX'", "letters R and S")
    refused(lambda: given(["RS", "RRS"]), "equal rows")
    refused(lambda: given(["SS", "RS"], granularity="layer"), "heads.roles[1]: got 'RS'", "one role per layer")
    refused(lambda: given(["RRSS"], balance=2), "heads.roles[0]: got 'RRSS'", "2 equal slices")


def test_slice_roles():
    assert [slice_roles("RSSRRRSS", rank, 4) for rank in range(4)] == ["RS", "SR", "RR", "SS"]
    assert "".join(slice_roles("RSSRRRSS", rank, 2) for rank in range(2)) == "RSSRRRSS"
    refused(lambda: slice_roles("RSS", 0, 2), "size: got 2", "divisor of the 3 KV heads")
    refused(lambda: slice_roles("RSS", 0, 0), "size: got 0")
    refused(lambda: slice_roles("RSS", 3, 3), "rank: got 3", "0 to 2")
    refused(lambda: slice_roles("RSS", -1, 3), "rank: got -1")


def test_no_cut_falls_among_heads_that_all_scored_zero():
    assert usable_cuts([0.5, 0.0, 0.0, 0.2]) == [0, 1, 2, 4]
    assert usable_cuts([0.5, 0.5, 0.1, 0.2]) == [0, 1, 2, 3, 4]
    assert usable_fraction([[0.5, 0.0], [0.0, 0.2]], 0.75) == 0.5
    assert usable_fraction([[0.5, 0.0, 0.0]], 0.7) == 0.333333
    assert usable_fraction([[0.5, 0.0], [0.0, 0.2]], 0.5) == 0.5
    assert usable_fraction([[0.5, 0.3], [0.0, 0.2]], 0.7) == 0.7
    for fraction in (0.1, 0.3, 0.75, 0.9):
        assert assign([[0.5, 0.0], [0.0, 0.2]], fraction=usable_fraction([[0.5, 0.0], [0.0, 0.2]], fraction))
    refused(lambda: assign([[0.5, 0.0], [0.0, 0.2]], fraction=0.75), "largest usable retrieval_fraction: 0.5")
