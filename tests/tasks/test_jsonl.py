"""The task ``jsonl``: the user's own questions, whole or not at all, each of them once."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from helpers.kinds import TEXTS, language_of, tokenizer_of
from transformers import AddedToken

from hf_longctx.errors import ConfigError
from hf_longctx.tasks import task_from, tasks_from
from hf_longctx.tasks.language import language_for
from hf_longctx.tasks.synthetic.jsonl import Jsonl

LINES = [
    {"context": f"The ship {name} is at sea. " * (4 * i + 1), "question": f"Where is {name}?", "answers": "at sea"}
    for i, name in enumerate(("anna", "bertha", "clara", "dora"))
]
LINES[1] |= {"answers": ["on the sea", "At Sea"], "id": "second"}


@pytest.fixture
def write(tmp_path):
    def written(lines, name="mine.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), "utf-8")
        return str(path)

    return written


def sizes_of(task, language) -> list[int]:
    return [tokens for _, tokens in task.texts(language)]


@pytest.mark.parametrize("kind", TEXTS)
def test_a_prompt_is_the_line_and_nothing_is_cut(kind, write):
    task, language = task_from(f"jsonl:file={write(LINES)}"), language_of(kind)
    sizes = sizes_of(task, language)
    for number, line in enumerate(LINES):
        sample = task.make(language, max(sizes), seed=number)
        (question,) = sample.questions
        assert sample.length == sizes[number] == sample.metadata["tokens"] and sample.needles == ()
        assert sample.context[: len(language.prefix)].tolist() == language.prefix
        said = "".join(language.decode(ids) for ids in (sample.context, question.prompt)).casefold()
        want = f"{line['context']}{line['question']}nswer:".casefold()  # some of these tokenizers have no A
        assert "".join(said.split()).replace("answer", "nswer") == want.replace(" ", "")
        first = line["answers"] if isinstance(line["answers"], str) else line["answers"][0]
        whole = language.decode([*question.prompt, *question.target])
        assert whole[len(language.decode(question.prompt)) :].strip() == first
        assert question.score("It is AT  sea.") == 1.0 and question.score("at home") == 0.0
        assert question.told[-1] == 4 * number + 1 and len(question.target) <= question.room
        assert sample.metadata["id"] == ("second" if number == 1 else str(number + 1))


def test_the_chat_template_is_around_it(write):
    tokenizer = tokenizer_of("bos_eos")
    language = language_for(tokenizer, chat=True)
    sample = task_from(f"jsonl:file={write(LINES)}").make(language, 4000)
    ids = [*sample.context.tolist(), *sample.questions[0].prompt.tolist()]
    said = f"<|user|>\n{LINES[0]['context']}\n\n{LINES[0]['question']}</s>\n<|assistant|>\nAnswer:"
    assert tokenizer.decode(ids) == f"<s>{said}"


@pytest.mark.parametrize("named", [True, False])
def test_what_looks_like_a_special_token_is_text(named, write):
    tokenizer = copy.deepcopy(tokenizer_of("bos_eos"))
    if not named:
        tokenizer.add_tokens(AddedToken("<end>", special=True))
    token = "</s>" if named else "<end>"
    language = language_for(tokenizer)
    line = {"context": f"He wrote {token} and left.", "question": f"What is {token}?", "answers": token}
    sample = task_from(f"jsonl:file={write([line])}").make(language, 400)
    (question,) = sample.questions
    ids = [*sample.context[len(language.prefix) :], *question.prompt, *question.target]
    assert tokenizer.convert_tokens_to_ids(token) not in ids and f"{token} and left." in language.decode(ids)


def test_a_length_leaves_out_what_is_longer_and_takes_no_text_twice(write):
    task, language = task_from(f"jsonl:file={write(LINES * 3)}"), language_of("bytes")
    sizes = sizes_of(task, language)
    short, middle, long, longest = sorted(set(sizes))
    chosen = task.chosen(language, [long, short], 100, seed=0)
    assert list(chosen) == [short, long]
    made = {n: [task.make(language, n, seed=one).metadata for one in seeds] for n, seeds in chosen.items()}
    assert {one["tokens"] for one in made[short]} == {short} and len(made[short]) == 3
    assert sorted(one["tokens"] for one in made[long]) == [middle] * 3 + [long] * 3
    notes = task.notes(language, chosen, 100)
    assert notes == (
        f"length {short}: 3 prompts of {short} to {short} tokens, all there are of the 100 asked for",
        f"length {long}: 6 prompts of {middle} to {long} tokens, all there are of the 100 asked for",
        f"3 of 12 texts have more than {long} tokens and were left out; the longest has {longest}",
    )
    (one,) = task.notes(language, task.chosen(language, [longest], 1, 0), 1)
    assert one.startswith(f"length {longest}: 1 prompt of ") and one.endswith("tokens")


def test_the_seed_orders_the_lines_and_more_of_them_are_the_same_and_others(write):
    lines = [line | {"id": number} for number, line in enumerate(LINES * 5)]
    task, language = task_from(f"jsonl:file={write(lines)}"), language_of("bytes")
    length = max(sizes_of(task, language))
    few, more = (task.chosen(language, [length], samples, seed=1)[length] for samples in (4, 20))
    assert few == more[:4] and sorted(more) == list(range(20)) != more
    assert more == task.chosen(language, [length], 20, seed=1)[length]
    assert more != task.chosen(language, [length], 20, seed=2)[length]
    ids = [task.make(language, length, seed=one).metadata["id"] for one in more]
    assert len(set(ids)) == 20
    again = task.make(language, length, seed=more[0] + 20)
    assert np.array_equal(again.context, task.make(language, length, seed=more[0]).context), "then from the first on"


def test_lengths_without_a_text_say_what_there_is(write):
    task, language = task_from(f"jsonl:file={write(LINES)}"), language_of("bytes")
    least, most = min(sizes_of(task, language)), max(sizes_of(task, language))
    said = f"has {least}, the longest {most}; give a length of {least} or more"
    for start in (lambda: task.make(language, least - 1), lambda: task.chosen(language, [least - 1, most], 8, 0)):
        with pytest.raises(ConfigError, match=f"length: no prompt of jsonl:.* has 1 to {least - 1} tokens.*{said}"):
            start()
    with pytest.raises(ConfigError, match=f"has {most + 1} to {most + 9} tokens.*leave {most + 9} out"):
        task.chosen(language, [most, most + 9], 8, 0)


def test_a_file_that_changes_changes_no_run_that_has_begun(write):
    name = write(LINES)
    task, tokenizer = task_from(f"jsonl:file={name}"), tokenizer_of("bytes")
    language = language_for(tokenizer)
    before = sizes_of(task, language)
    write(LINES[:2])
    assert sizes_of(task, language) == before and sizes_of(task, language_for(tokenizer)) == before[:2]


def test_fields_and_names(write):
    name = write(LINES)
    task = task_from(f"jsonl:file={name}:room=5:metric=string_match")
    assert task == Jsonl(metric="string_match", room=5, file=name) and task_from(task.name) == task
    assert tasks_from([task]) == (task,)
    sample = task.make(language_of("bytes"), 4000, seed=1)
    assert sample.questions[0].room == 5 and sample.questions[0].score("at sea") == 0.5
    assert task_from(f"jsonl:file={name}").make(language_of("bytes"), 4000).questions[0].room == 64
    for wrong, said in (
        ("jsonl", "tasks.file: missing"),
        (f"jsonl:file={name}x", "tasks.file: .* cannot be read"),
        (f"jsonl:file={name}:room=0", "tasks.room: got 0"),
        (f"jsonl:flie={name}", "tasks.flie: unknown key; fields of task 'jsonl': file, metric, room"),
    ):
        with pytest.raises(ConfigError, match=said):
            task_from(wrong)
    with pytest.raises(ConfigError, match="depth: .* leave it out"):
        task.check(language_of("bytes"), 0.5)
    for start in (lambda: task.make(language_of("tiny"), 400), lambda: task.texts(language_of("tiny"))):
        with pytest.raises(ConfigError, match="embedded models' language"):
            start()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2: no JSON"),
        ({"question": "q", "answers": "a"}, "line 2: context: got nothing"),
        ({"context": "c", "question": " ", "answers": "a"}, "line 2: question: got an empty text"),
        ({"context": "c", "question": "q"}, "line 2: answers: got nothing"),
        ({"context": "c", "question": "q", "answers": []}, "line 2: answers: the list is empty"),
        ({"context": "c", "question": "q", "answers": ["a", 3]}, r"line 2: answers\[1\]: got int"),
        ({"context": "c", "question": "q", "answer": "a"}, "line 2: unknown key 'answer'.*answers"),
        ({"context": "c", "question": "q", "answers": "a", "id": 1.5}, "line 2: id: got float"),
    ],
)
def test_a_bad_line_is_named_when_the_task_is(line, said, write):
    with pytest.raises(ConfigError, match=f"tasks.file: .*{said}"):
        task_from(f"jsonl:file={write([LINES[0], line])}")
