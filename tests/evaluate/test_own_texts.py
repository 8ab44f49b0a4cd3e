"""``eval`` of the user's own questions: each is asked once, and what was left out is said."""

from __future__ import annotations

import json

import pytest
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from typer.testing import CliRunner

from hf_longctx import ConfigError
from hf_longctx.commands._app import app
from hf_longctx.evaluate.run import evaluate
from hf_longctx.tasks import task_from
from hf_longctx.tasks.language import language_for

ASKED = {"lengths": [300, 700], "samples": 4, "answers": "forced"}


def line(number: int) -> dict:
    says = "The plain teacher watched the warm train in spring. " * (1 + number)
    return {"context": f"{says}The code is {number}.", "question": "What is the code?", "answers": [str(number)]}


@pytest.fixture(scope="module")
def model():
    made = tiny_model(layers=2)
    made.resize_token_embeddings(700)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line(number)) for number in range(20)))
    return path


@pytest.fixture
def ask(model, tokenizer, file, tmp_path):
    config = config_for(model, "mixed", recent=8)

    def asked(out="out", tasks=f"jsonl:file={file}", **options):
        found = evaluate(model, tokenizer, tmp_path / out, tasks=tasks, config=config, **ASKED | options)
        lines = (tmp_path / out / "records-0.jsonl").read_text().splitlines()
        return found, [json.loads(one) for one in lines[1:]]

    return asked


def test_every_line_once_by_its_length_and_what_is_longer_is_said(ask, file, tokenizer, tmp_path):
    summary, records = ask(samples=100)
    name, language = f"jsonl:file={file}", language_for(tokenizer)
    sizes = [tokens for _, tokens in task_from(name).texts(language)]
    short, long = ([n for n in sizes if low < n <= high] for low, high in ((0, 300), (300, 700)))
    assert short and long and len(short) + len(long) < 20
    dense = [one for one in records if one["variant"] == "dense"]
    assert len({one["id"] for one in dense}) == len(dense) == len(records) / 2 == len(short) + len(long)
    for length, want in ((300, short), (700, long)):
        assert sorted(one["tokens"] for one in dense if one["length"] == length) == want
    for one in dense[:3]:
        sample = task_from(one["task"]).make(language, one["length"], one["depth"], one["seed"])
        assert sample.metadata["id"] == one["id"] and one["expected"] == [[str(int(one["id"]) - 1)]]
    left = f"{20 - len(dense)} of 20 texts have more than 700 tokens and were left out; the longest has {max(sizes)}"
    assert summary.notes[name][-1] == left and f"{len(short)} prompts of {min(short)} to" in summary.notes[name][0]
    assert "of the KV memory at up to 700 tokens" in str(summary)
    assert left in (tmp_path / "out" / "report" / "index.html").read_text()
    assert [row.depth for row in summary.by_depth] == [None, None]
    assert [row.cells["dense"].cases for row in summary.by_length] == [len(short), len(long)]


def test_beside_other_tasks_and_decoded(ask, file):
    summary, records = ask(tasks=f"needle,jsonl:file={file}", lengths=[400], depths=[0.5], samples=2, answers="greedy")
    assert summary.tasks == ("needle", f"jsonl:file={file}") and len(records) == 2 * 2 * 2
    assert all(len(one["outputs"]) == 1 for one in records)
    assert summary.overall.cells["patched"].cases == 4


def test_a_finished_run_is_not_run_again_and_a_changed_file_is_refused(ask, file, monkeypatch):
    first, records = ask()
    with monkeypatch.context() as patch:
        patch.setattr("hf_longctx.evaluate.run.forced_of", lambda *_: pytest.fail("something was run"))
        assert ask()[0] == first
    told = [int(one["id"]) - 1 for one in records if one["variant"] == "dense"]
    lines = [line(number) for number in range(20)]
    for number in told:
        for key, value in (("answers", "x"), ("question", "What's the code?")):
            changed = [one | {key: value} if i == number else one for i, one in enumerate(lines)]
            file.write_text("\n".join(map(json.dumps, changed)))
            with pytest.raises(ConfigError, match="other settings: prompts"):
                ask()
    file.write_text("\n".join(map(json.dumps, lines)))
    assert ask()[0] == first


def test_a_prompt_is_too_long_for_the_model_by_its_own_length(ask, model, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 650)
    _, records = ask(lengths=[600, 700], samples=100)
    note = "some prompts are longer than the 650 tokens that the model was made for"
    said = {one["tokens"]: note in one["notes"] for one in records}
    assert said == {tokens: tokens > 650 for tokens in said} and len(set(said.values())) == 2


def test_lengths_without_a_line_are_refused_before_anything_runs(ask, tmp_path):
    with pytest.raises(ConfigError, match=r"length: no prompt of jsonl:.* has 1 to 20 tokens.*give a length of \d+"):
        ask(lengths=[20])
    assert not (tmp_path / "out").exists()


def test_a_bad_file_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_longctx.commands.eval.load_model", lambda *_: pytest.fail("the model was loaded"))
    task = f"jsonl:file={tmp_path / 'none.jsonl'}"
    given = ["eval", "hf-longctx/tiny-llama", "--tasks", task, "--lengths", "128", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert refused.exit_code == 2 and "cannot be read" in refused.output
