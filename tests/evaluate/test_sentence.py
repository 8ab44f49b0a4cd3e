"""The sentence that a report begins with: every verdict in its exact words, and losses that an average would hide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.eval_cases import SWEPT, headers_of, plan_of, records_of
from rich.console import Console

from hf_longctx.commands.eval import show
from hf_longctx.evaluate.measures import ENOUGH, FEW, MARGIN, RULE, Interval
from hf_longctx.evaluate.page import page
from hf_longctx.evaluate.sentence import sentences
from hf_longctx.evaluate.summary import line, summarize

pytestmark = pytest.mark.quick

MEMORY = "50 % of the KV memory at 2048 tokens"


def found(score, samples=6, lengths=(512, 2048), names=("dense", "patched"), tasks="needle"):
    plan = plan_of(names, tasks, text=False, lengths=lengths, samples=samples)
    return summarize(plan, records_of(plan, score))


def tie(v, c, case):
    """Patched wins a hundredth on one half of the prompts and loses it on the other."""
    return 0.5 + 0.01 * v * (-1) ** c


def equal(v, c, case):
    return 1.0


def half_lost(v, c, case):
    return 0.0 if v and c % 2 else 1.0


def half_won(v, c, case):
    return 1.0 if v and c % 2 else 0.0


def scattered(v, c, case):
    """One prompt in nine is lost and one won: no difference, but too few prompts to rule one out."""
    return {0: 1 - v, 1: v}.get(c % 9, 1)


@pytest.mark.parametrize(
    ("score", "samples", "verdict", "figures"),
    [
        (tie, 6, "as well as", "+0.000 [-0.003, +0.003], 36 prompts"),
        (equal, 6, "as well as", "+0.000 [+0.000, +0.000], 36 prompts"),
        (half_lost, 6, "worse than", "-0.500 [-0.667, -0.333], 36 prompts"),
        (half_won, 6, "better than", "+0.500 [+0.333, +0.667], 36 prompts"),
        (scattered, 6, None, "+0.000 [-0.139, +0.140], 36 prompts"),
        (equal, 4, None, "+0.000 [+0.000, +0.000], 24 prompts"),
    ],
)
def test_every_verdict_has_its_words(score, samples, verdict, figures):
    if verdict is None:
        want = f"Not enough prompts to tell whether patched answers as well as dense ({figures}); it holds {MEMORY}."
    else:
        want = f"Patched answers {verdict} dense ({figures}) with {MEMORY}."
    assert sentences(found(score, samples)) == [want]


def test_a_single_prompt_has_no_interval():
    (said,) = sentences(found(half_lost, samples=1, lengths=(2048,), tasks="common_words"))
    assert said == (
        f"Not enough prompts to tell whether patched answers as well as dense (+0.000, 1 prompt); it holds {MEMORY}."
    )


@pytest.mark.parametrize(
    ("low", "high", "pairs", "verdict"),
    [
        (-0.2, -0.1, FEW, "worse"),
        (-0.2, -0.1, FEW - 1, None),
        (0.1, 0.2, FEW, "better"),
        (0.1, 0.2, FEW - 1, None),
        (-0.001, -0.0001, 5000, "worse"),
        (-MARGIN, 0.5, ENOUGH, "as well as"),
        (-MARGIN, 0.0, ENOUGH, "as well as"),
        (0.0, 0.0, ENOUGH, "as well as"),
        (0.0, 0.0, ENOUGH - 1, None),
        (-MARGIN - 0.001, 0.0, 5000, None),
        (None, None, 1, None),
    ],
)
def test_the_verdict_is_that_of_the_rule(low, high, pairs, verdict):
    assert Interval(0.0, low, high, pairs, 0.95).verdict == verdict
    assert all(str(number) in RULE for number in (FEW, ENOUGH, MARGIN))
    told = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")
    for said in (f"at least {ENOUGH} prompts", f"no lower than -{MARGIN}", f"at least {FEW} prompts"):
        assert said in told


def test_a_loss_that_the_average_hides_is_named():
    def lost_when_long(v, c, case):
        return 0.0 if v and case.length == 2048 and case.task.name == "needle" else 0.5 + 0.5 * v

    (said,) = sentences(found(lost_when_long, samples=6, tasks="needle,passkey"))
    assert said.startswith("Patched answers better than dense (+0.250 [")
    assert said.endswith(" But it is worse on needle at 2048 tokens (-0.500 [-0.500, -0.500], 18 prompts).")
    (one_task,) = sentences(found(lost_when_long, lengths=(512, 1024, 2048)))
    assert one_task.count("But it is worse on") == one_task.count("2048 tokens (") == 1, "one row, not one per table"
    (said,) = sentences(found(half_lost, tasks="needle,passkey"))
    assert "But" not in said, "it is worse over everything, and that is said"


def test_every_variant_of_a_sweep_has_a_sentence_the_given_one_first():
    said = sentences(found(lambda v, c, case: 1 - v / 10, names=SWEPT))
    assert [one.partition(" ")[0] for one in said] == ["Patched", *SWEPT[2:]]
    assert all("answers worse than dense" in one for one in said)
    assert [re.search(r"with (.*) of the KV", one)[1] for one in said] == ["50 %", "33 %", "25 %", "20 %"]


def test_the_memory_is_that_of_the_longest_length():
    plan = plan_of(tasks="needle", text=False, lengths=(2048, 512), samples=6)
    records = records_of(plan, tie)
    for record in records:
        if record["variant"] == "patched":
            record["cache_bytes"] = 1000 * record["length"] * (7 if record["length"] == 512 else 0.0041)
    assert "with 0.41 % of the KV memory at 2048 tokens." in sentences(summarize(plan, records))[0]


def test_the_page_and_the_terminal_begin_with_it_and_mark_the_losses(tmp_path):
    plan = plan_of(("dense", "patched", "recent=16"), "needle", text=False, lengths=(512, 2048), samples=6)
    records = records_of(plan, lambda v, c, case: 1 - v // 2)
    summary = summarize(plan, records)
    patched, swept = sentences(summary)
    html = page(summary, headers_of(plan), records, [])
    assert re.findall(r"<p[^>]*>([^<]*)</p>", html)[:2] == [patched, swept] and html.count('class="verdict"') == 1
    marked = re.findall(r'<td class="worse">([^<]*)</td>', html)
    assert marked == ["-1.000 worse"] * 3, "two lengths and all of it; patched, which is not, is not marked"
    assert line(summary.overall, "recent=16")[5] == "-1.000 worse" and line(summary.overall, "patched")[5] == "+0.000"
    said = Console(width=200, record=True, file=(tmp_path / "out").open("w"), force_terminal=True)
    show(said, summary, tmp_path)
    shown = said.export_text(styles=True)
    assert shown.splitlines()[:2] == [patched, swept]
    assert shown.count("\x1b[1m-1.000 worse") == 2 and shown.count("worse") == 3, "two lengths and the sentence"
