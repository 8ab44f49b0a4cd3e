"""Tasks by their words, and metrics: everything unknown is refused before anything is generated."""

from __future__ import annotations

import pytest
from helpers.kinds import CASES

from hf_longctx.errors import ConfigError
from hf_longctx.tasks import task_from, tasks_from
from hf_longctx.tasks.answer import score
from hf_longctx.tasks.metrics import METRICS
from hf_longctx.tasks.synthetic.needle import Needle
from hf_longctx.tasks.synthetic.passkey import Passkey

pytestmark = pytest.mark.quick


def test_a_task_and_its_fields_by_name():
    assert task_from("passkey") == Passkey()
    task = task_from(" needle:variant=multi_key:needles=8:metric=exact_match")
    assert task == Needle("exact_match", "multi_key", 8)
    assert task.name == "needle:metric=exact_match:variant=multi_key:needles=8"
    assert tasks_from("needle, passkey") == (Needle(), Passkey())
    for case in CASES:
        assert task_from(task_from(case).name) == task_from(case)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nedle", "got 'nedle'.*Did you mean 'needle'"),
        ("needle,", "got ''"),
        ("answer", "got 'answer', expected one of: common_words"),
        ("tiny_language", "expected one of"),
        ("needle:varient=single", "tasks.varient: unknown key.*Did you mean 'variant'"),
        ("needle:variant=multikey", "Did you mean 'multi_key'"),
        ("needle:metric=string_mach", "tasks.metric: got 'string_mach'.*Did you mean 'string_match'"),
        ("needle:needles=3", "tasks.needles: got 3, but variant 'single' has one"),
        ("needle:variant=multi_key:needles=1", "at least 2"),
        ("needle:variant=multi_key:questions=5", "questions: got 5; .* at most its 4 needles"),
        ("facts:facts=4:questions=5", "questions: got 5, but a text has 4 facts"),
        ("needle:variant=multi_value:questions=2", "questions: got 2; only multi_key"),
        ("needle:needles", "got 'needles', expected NAME=VALUE"),
        ("passkey:task=needle", "not a field"),
        ("needle:variant=multi_key:needles=4:needles=8", "needles is given twice"),
        ([["needle"]], "tasks: got .*expected text"),
        ("threading:hops=0", "tasks.hops: got 0"),
        ("frequent_words:alpha=1", "tasks.alpha: got 1"),
        ("common_words:count=3", "tasks.others: got 3, expected less than count"),
        ("passkey,needle,passkey", "passkey is named twice"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message):
        tasks_from(text)


@pytest.mark.parametrize(
    ("metric", "output", "answers", "share"),
    [
        ("string_match", "They are Abc, and xyz.", ["abc", "xyz"], 1.0),
        ("string_match", "abc", ["abc", "xyz", "uvw", "rst"], 0.25),
        ("string_match", "a b\n c d", ["b c"], 1.0),
        ("string_match", "ab c", ["abc"], 0.0),
        ("string_match_any", "abc", ["abc", "xyz"], 1.0),
        ("string_match_any", "", ["abc", "xyz"], 0.0),
        ("exact_match", ' "ABC".\nand more', ["abc"], 1.0),
        ("exact_match", " **abc**, “xyz”", ["abc", "xyz"], 1.0),
        ("exact_match", "abc def", ["abc"], 0.0),
        ("exact_match", "It is abc", ["abc"], 0.0),
        ("exact_match", "xyz and abc", ["abc", "xyz"], 1.0),
        ("exact_match", "xyz, abc, uvw", ["abc", "xyz"], 0.0),
        ("exact_match", "abc", ["abc", "xyz"], 0.0),
        ("exact_match", "", ["abc"], 0.0),
        ("exact_match", "sandy band", ["sandy band"], 1.0),
    ],
)
def test_metrics(metric, output, answers, share):
    assert METRICS[metric](output, answers) == share


def test_every_metric_is_tried_above_and_says_what_it_is():
    assert set(METRICS) == {"string_match", "string_match_any", "exact_match"}
    assert all(one.__doc__ and name == one.__name__ for name, one in METRICS.items())


def test_the_metric_of_a_task_scores_its_questions():
    from helpers.kinds import language_of

    for metric, expected in (("string_match", 0.5), ("string_match_any", 1.0), ("exact_match", 0.0)):
        task = task_from(f"needle:variant=multi_query:needles=2:metric={metric}")
        (question,) = task.make(language_of("bytes"), 900).questions
        assert score([question], [f" {question.answers[1]}"]) == [expected]
    with pytest.raises(ValueError, match="shorter|longer"):
        score([question], [])
