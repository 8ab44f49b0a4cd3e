"""Every task in every language: exact lengths, answers where they are promised and nowhere else, right scores."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from collections import Counter

import numpy as np
import pytest
from helpers.kinds import CASES, COUNTED, DRAWN, TEXTS, can_say, language_of, spoken
from helpers.tiny_tokenizer import byte_bpe

from hf_longctx.config.words import load
from hf_longctx.errors import ConfigError
from hf_longctx.tasks import task_from
from hf_longctx.tasks.base import Sample, Task
from hf_longctx.tasks.language import language_for
from hf_longctx.tasks.synthetic import passkey

SPOKEN = spoken()
LENGTH = 1100
DEEP = [(kind, case) for kind, case in SPOKEN if not case.startswith(COUNTED)]


@functools.cache
def made(kind: str, case: str, length: int = LENGTH, depth: float | None = None, seed: int = 0) -> Sample:
    return task_from(case).make(language_of(kind), length, depth, seed)


def same(one: Sample, other: Sample) -> bool:
    prompts = [[q.prompt.tolist() for q in sample.questions] for sample in (one, other)]
    return np.array_equal(one.context, other.context) and prompts[0] == prompts[1]


def test_the_cases_show_every_task_and_both_kinds_of_language():
    assert {case.partition(":")[0] for case in CASES} == set(DRAWN)
    assert all(set(task_from(case).name.split(":")) == set(case.split(":")) for case in CASES)
    tiny = {case for kind, case in SPOKEN if kind == "tiny"}
    assert {"passkey", "key_value"} <= tiny < set(CASES) and len(DEEP) < len(SPOKEN)
    assert not {"variable_tracking", "threading", "needle:variant=multi_value"} & tiny
    for word in DRAWN:
        task = load("tasks.synthetic", word)
        assert issubclass(task, Task) and task.__dataclass_params__.frozen and task.paper.startswith("arXiv:")


@pytest.mark.parametrize(("kind", "case"), SPOKEN)
def test_lengths_are_exact_and_answers_stand_where_they_are_promised(kind, case):
    language = language_of(kind)
    for length, seed in ((LENGTH, 0), (LENGTH, 1), (1301, 2)):
        sample = made(kind, case, length, seed=seed)
        longest = max(len(question.prompt) for question in sample.questions)
        assert sample.length == len(sample.context) + longest == length
        assert sample.context.dtype == np.int64 and sample.context[: len(language.prefix)].tolist() == language.prefix
        text = language.decode(sample.context).casefold()
        inside = " ".join(language.decode(sample.context[a:b]).casefold() for a, b in sample.needles)
        for question in sample.questions:
            assert len(set(question.answers)) == len(question.answers) == len(question.told)
            for answer, told in zip(question.answers, question.told, strict=True):
                assert told >= 1 and text.count(answer) == told
                assert inside.count(answer) == (0 if case.startswith(COUNTED) else told)
                assert answer not in language.decode(question.prompt).casefold()
            target = language.decode([*question.prompt, *question.target])
            assert question.score(target[len(language.decode(question.prompt)) :]) == 1
            assert question.target.dtype == np.int64 and len(question.target) <= question.room


@pytest.mark.parametrize(("kind", "case"), SPOKEN)
def test_a_sample_depends_on_its_arguments_alone(kind, case):
    one, other = made(kind, case, seed=0), made(kind, case, seed=1)
    again = task_from(case).make(language_of(kind), LENGTH, None, 0)
    assert one is not again and same(one, again) and one.questions[0].answers == again.questions[0].answers
    assert not same(one, other) and one.questions[0].answers != other.questions[0].answers
    assert one.metadata == {"task": task_from(case).name, "length": LENGTH, "depth": None, "seed": 0}


@pytest.mark.parametrize(("kind", "case"), SPOKEN)
def test_the_right_answer_scores_and_no_other_does(kind, case):
    wrong = made(kind, case, seed=1).questions
    for question in made(kind, case, seed=0).questions:
        right = ", ".join(question.answers)
        assert question.score(f" {right}. And so on") == 1.0
        assert question.score("") == 0.0
        assert question.score(" ".join(" ".join(other.answers) for other in wrong)) == 0.0
        if len(question.answers) > 1:
            assert question.score(question.answers[0]) == pytest.approx(1 / len(question.answers))


@pytest.mark.parametrize(("kind", "case"), DEEP)
def test_depth_places_what_is_asked_for(kind, case):
    depths = (0.0, 0.4, 1.0)
    samples = [made(kind, case, 1600, depth) for depth in depths]
    last = [max(end for _, end in sample.needles) for sample in samples]
    assert last == sorted(last) and len(set(last)) == 3
    assert [sample.metadata["depth"] for sample in samples] == list(depths)
    first = min(begin for begin, _ in samples[0].needles)
    told = sum(end - begin for begin, end in samples[0].needles)
    assert last[0] - first == told, "at depth 0 they stand together"
    assert first < 200, "after the introduction"
    tail = len(samples[2].context) - last[2]
    assert tail <= (128 if kind != "tiny" else 0), "at depth 1 at most a part of a sentence follows"
    assert made(kind, case, seed=0).needles != made(kind, case, seed=1).needles, "without a depth: anywhere"


@pytest.mark.parametrize(("kind", "case"), SPOKEN)
def test_no_room_is_an_error_with_the_length_it_needs(kind, case):
    with pytest.raises(ConfigError, match=r"length: got 12 tokens, but .* needs at least (\d+)") as caught:
        made(kind, case, 12)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert made(kind, case, needed).length == needed
    with pytest.raises(ConfigError, match="needs at least"):
        made(kind, case, needed - 1)


@pytest.mark.parametrize("kind", TEXTS)
def test_what_hides_facts_is_cut_between_sentences(kind):
    for seed in range(3):
        sample, language = made(kind, "needle", seed=seed), language_of(kind)
        (begin, end), context = sample.needles[0], sample.context
        assert language.decode(context[:begin]).rstrip().endswith((".", "text:", "Text:"))
        assert language.decode(context[begin:end]).strip().endswith(".")
        assert language.decode(context[end:]).strip()[:3].casefold() in ("the", "he")  # the unigram one has no "T"


def test_pairs_fill_the_context_as_json_and_threads_run_forward():
    language = language_of("bytes")
    for case in ("key_value", "threading:threads=2:hops=3"):
        for length in (1500, 3000):
            sample = made("bytes", case, length)
            text = language.decode(sample.context)
            pairs = json.loads(text[text.index("{") :])
            assert len(language.decode(sample.context).partition("Below")[0]) < 120, "hardly any filler"
            assert len(pairs) > length / 60
    keys, prompt = list(pairs), language.decode(sample.questions[0].prompt)
    starts = sorted((key for key in keys if key in prompt), key=prompt.index)
    ends = []
    for key in starts:
        for _ in range(2):
            assert keys.index(pairs[key]) > keys.index(key)
            key = pairs[key]
        ends.append(pairs[key])
    assert tuple(ends) == sample.questions[0].answers and not set(ends) & set(keys)


def test_assignments_lead_to_the_value_asked_for():
    sample, language = made("bytes", "variable_tracking:chains=3:hops=2", 1500), language_of("bytes")
    values: dict[str, str] = {}
    for name, variable, number in re.findall(r" VAR (\w+) = (?:VAR (\w+)|(\d+))\.", language.decode(sample.context)):
        values[name] = number or values[variable]  # a KeyError where a variable is read before it is assigned
    (question,) = sample.questions
    asked = re.search(r"hold the value (\d+),", language.decode(question.prompt))[1]
    assert len(values) == 9 and len(set(values.values())) == 3
    assert {name for name, value in values.items() if value == asked} == set(question.answers)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(COUNTED)])
def test_the_words_asked_for_are_the_most_frequent(case):
    for seed in range(3):
        sample, language = made("bytes", case, 2000, seed=seed), language_of("bytes")
        listed = language.decode(sample.context).rpartition(":")[2].split()
        ranked = [(word, count) for word, count in Counter(listed).most_common() if word != "..."]
        answers = sample.questions[0].answers
        assert {word for word, _ in ranked[: len(answers)]} == set(answers)
        assert ranked[len(answers) - 1][1] > ranked[len(answers)][1]


def test_the_counts_of_frequent_words_follow_the_power_law():
    counts = task_from("frequent_words").counts(1000)
    assert sum(counts) == 1000 and counts[:4] == [607, 151, 67, 37]
    assert task_from("frequent_words:alpha=3").counts(1000)[0] == 831


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("asked", [1, 2, 3, 7])
def test_in_the_shortest_text_the_words_asked_for_are_the_most_frequent(alpha, asked):
    task = task_from(f"frequent_words:alpha={alpha}:words={asked}")
    least = task.least
    for n in (least, least + 1, 2 * least) if least < 10**5 else (least,):
        counts = task.counts(n)
        assert counts[asked] > max(counts[asked + 1 :])


def test_the_fields_of_a_task_change_what_it_makes():
    def text(case: str) -> str:
        return language_of("bytes").decode(made("bytes", case, 2500).context)

    assert text("needle:variant=multi_key:needles=9").count("The code of the") == 9
    assert text("needle:variant=multi_value:needles=5").count("One of the codes of the") == 5
    assert text("variable_tracking:chains=3:hops=5").count(" VAR ") == 3 * (6 + 5)
    assert len(made("bytes", "key_value:questions=6").questions) == 6
    assert len(made("tiny", "needle:variant=multi_query").questions) == 4
    assert len(made("bytes", "needle:variant=multi_query").questions) == 1


@pytest.mark.parametrize("case", [case for case in CASES if not can_say("tiny", case)])
def test_what_the_embedded_models_cannot_say_is_refused_at_the_start(case):
    task = task_from(case)
    for start in (lambda: task.check(language_of("tiny")), lambda: made("tiny", case)):
        with pytest.raises(
            ConfigError, match="embedded models' language.*(key_value, needle, .*passkey|single, multi_key)"
        ):
            start()
    task.check(language_of("bytes"))


@pytest.mark.parametrize("case", COUNTED)
def test_depth_without_a_meaning_is_refused(case):
    with pytest.raises(ConfigError, match="depth: .* leave it out"):
        task_from(case).check(language_of("bytes"), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length: got 0"),
        ({"length": 900.0}, "length: got 900.0"),
        ({"length": 900, "depth": 1.5}, "depth: got 1.5"),
        ({"length": 900, "seed": -1}, "seed: got -1"),
    ],
)
def test_arguments_have_bounds(arguments, message):
    with pytest.raises(ConfigError, match=message):
        task_from("passkey").make(language_of("bytes"), **arguments)


def test_an_answer_in_the_filler_is_drawn_again_and_given_up_in_the_end(monkeypatch, tmp_path):
    answer = made("bytes", "passkey", seed=5).questions[0].answers[0]
    (tmp_path / "x.txt").write_text(f"The number {answer} stands here. " * 20)
    language = language_for(language_of("bytes").tokenizer, text=tmp_path)
    sample = task_from("passkey").make(language, LENGTH, seed=5)
    assert sample.questions[0].answers[0] != answer and answer in language.decode(sample.context)
    always = dataclasses.replace(passkey.WORDING, values=lambda rng, count: [answer])
    monkeypatch.setattr(passkey, "WORDING", always)
    with pytest.raises(ConfigError, match="in 16 draws an answer stood in the filler"):
        task_from("passkey").make(language, LENGTH, seed=5)
    assert task_from("passkey").make(language_of("bytes"), LENGTH, seed=5).questions[0].answers == (answer,)


# Of prompts of this version: in bytes, and in the embedded models' language where it can say them.
SUMS = {
    "passkey": (3672244795, 4287902032),
    "needle": (3704785486, 345535073),
    "needle:variant=multi_key:needles=5:questions=3": (2297130030, 3073080338),
    "needle:variant=multi_value": (2404208700, None),
    "needle:variant=multi_query:needles=3": (1682512091, 2766594800),
    "key_value": (2640913760, 3831211983),
    "key_value:questions=4": (867659591, 1965456985),
    "variable_tracking": (421916618, None),
    "variable_tracking:chains=3:hops=2": (4141923118, None),
    "common_words:words=4:count=6:others=2": (4005137219, None),
    "frequent_words": (2164248099, None),
    "frequent_words:words=2:alpha=1.5": (478513484, None),
    "threading": (1789417697, None),
    "threading:threads=2:hops=3": (3843736257, None),
}


def sum_of(sample: Sample) -> int:
    ids = np.concatenate([sample.context, *(question.prompt for question in sample.questions)])
    return zlib.crc32(ids.astype("<i8").tobytes())


@pytest.mark.parametrize("case", SUMS)
def test_prompts_stay_what_they_were(case):
    """Figures of one version can be compared with those of another, and of another machine."""
    language = language_for(byte_bpe(259))  # bytes alone: training a tokenizer breaks ties at random
    text = sum_of(task_from(case).make(language, 4000, seed=3))
    tiny = sum_of(made("tiny", case, 1600, seed=3)) if can_say("tiny", case) else None
    assert (text, tiny) == SUMS[case]
