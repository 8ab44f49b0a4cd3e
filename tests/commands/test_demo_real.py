"""``demo --real``: any model that reads text, dense, patched and patched wrongly; and the real checkpoint itself."""

from __future__ import annotations

import io
import re
from statistics import mean

import pytest
import torch
from helpers.tiny import tiny_config
from helpers.tiny_tokenizer import byte_bpe
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxConfig
from hf_longctx.commands._app import app
from hf_longctx.commands._demo import Way
from hf_longctx.commands._demo_real import HAYSTACK, TASK, one_line, run, tell
from hf_longctx.model.checkpoint import real_checkpoint
from hf_longctx.tasks import task_from
from hf_longctx.tasks.forced import forced_answers
from hf_longctx.tasks.language import language_for

LENGTH = 1536
SIZES = {"length": LENGTH, "notes": 2, "prompts": 2, "seed": 5}
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A random model that reads text, and a config with scores of its heads."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = byte_bpe()
    tokenizer.chat_template = TEMPLATE
    config = tiny_config("llama")
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    scores = [[0.1 * (4 * layer + head) for head in range(4)] for layer in range(3)]
    made = LongCtxConfig.from_dict(
        {
            "model": LongCtxConfig.describe(config),
            "heads": {"scores": scores, "retrieval_fraction": 0.25},
            "stores": {"streaming": {"store": "sink_recent", "sink": 4, "recent": 64}},
        }
    )
    made.to_yaml(folder / "heads.yaml")
    return {"model": str(folder / "model"), "config": str(folder / "heads.yaml")}


@pytest.fixture(scope="module")
def ways(given) -> list[Way]:
    return run(**given, **SIZES)


def samples(given):
    language = language_for(AutoTokenizer.from_pretrained(given["model"]), haystack=HAYSTACK, chat=True)
    return language, [task_from(TASK.format(2)).make(language, LENGTH, seed=5 + i) for i in range(2)]


def test_three_ways_are_measured_on_the_same_questions(ways):
    dense, right, wrong = ways
    assert [way.name for way in ways] == ["dense", "patched", "wrong heads"]
    assert all(len(way.hits) == len(way.nll) == 4 and len(way.megabytes) == len(way.prefill) == 2 for way in ways)
    assert right.config.roles() == ("SSSS", "SSSS", "SRRR") and wrong.config.roles() == ("RRRS", "SSSS", "SSSS")
    assert mean(right.megabytes) == mean(wrong.megabytes) < 0.5 * mean(dense.megabytes)
    assert dense.nll != right.nll != wrong.nll


def test_the_likelihood_is_that_of_the_dense_model(ways, given):
    model = AutoModelForCausalLM.from_pretrained(given["model"]).eval()
    _, made = samples(given)
    want = [one.nll / one.tokens for sample in made for one in forced_answers(model, sample)]
    assert torch.allclose(torch.tensor(ways[0].nll), torch.tensor(want), rtol=1e-5)
    held = [2 * 3 * 4 * 8 * 4 * len(sample.context) / 1e6 for sample in made]
    assert ways[0].megabytes == held


def test_answers_are_shown_and_marked(given):
    language, (sample, _) = samples(given)
    compared = [Way("dense", "", None), Way("wrong heads", "", None)]
    first, second = (question.answers[0] for question in sample.questions)
    said = [[f" {first}. And\nmore", second], ["[red]" * 20, first]]
    console = Console(file=io.StringIO(), width=80)
    tell(console, language, sample, compared, said)
    lines = console.file.getvalue().splitlines()
    assert [line.split(maxsplit=2)[0:2] for line in lines if line.startswith("  dense")] == [["dense", "right"]] * 2
    marked = [line for line in lines if line.startswith("  wrong heads")]
    assert [line.split()[2] for line in marked] == ["wrong", "wrong"]
    assert f"  dense        right  {first}. And more" in lines
    assert marked[0].endswith("[red][red ..."), "what looks like markup is words"
    assert [line.split() for line in lines if line.startswith("  expected")] == [
        ["expected", first],
        ["expected", second],
    ]
    begin, end = sample.needles[0]
    fact = " ".join(language.decode(sample.context[begin:end]).split())
    assert fact in " ".join(" ".join(lines).split())
    assert "[assistant]" not in console.file.getvalue() and all(len(line) <= 80 for line in lines)


def test_the_command_prints_answers_and_the_table(given):
    sizes = ["--length", LENGTH, "--notes", 2, "--prompts", 1]
    args = ["demo", "--real", "--model", given["model"], "--config", given["config"], *sizes]
    done = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"^  (dense|patched|wrong heads) +(right|wrong) ", done.stdout, re.M)) == 6
    assert re.search(r"dense +│ +12 of 12 │ +\d of 2 │ +\d+\.\d{3} │", done.stdout)
    assert re.search(r"wrong heads +│ +3 of 12 │", done.stdout)
    assert "2 questions about 1 document of 1536 tokens" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_what_cannot_be_shown_is_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="heads have roles and no scores, so nothing says which heads are the wrong"):
        plain = LongCtxConfig.from_yaml(given["config"]).override(heads={"roles": ["RSRS"] * 3})
        plain.to_yaml(tmp_path / "roles.yaml")
        run(**{**given, "config": str(tmp_path / "roles.yaml")}, **SIZES)
    with pytest.raises(ConfigError, match="knows a language of notes and no English; hf-longctx demo shows it"):
        run(model="hf-longctx/tiny-llama")
    for option in ("--model", "--config"):
        done = CliRunner().invoke(app, ["demo", option, "x"])
        assert done.exit_code == 2 and f"{option}: got 'x', but only --real has a use for it." in done.output


def test_a_long_answer_is_cut_between_words():
    assert one_line("a  b\nc") == "a b c"
    assert one_line("one two three", 8) == "one two ..." and one_line("onetwothree", 6) == "onetwo ..."


@pytest.mark.slow
def test_the_demo_on_the_real_checkpoint():
    console = Console(file=io.StringIO(), width=80)
    dense, right, wrong = run(2048, 4, 2, model=str(real_checkpoint()), console=console)
    assert right.config.retrieval_heads == wrong.config.retrieval_heads == 45
    assert mean(dense.megabytes) == pytest.approx(30 * 2 * 3 * 64 * 4 * 2048 / 1e6, rel=0.05)
    assert mean(right.megabytes) < 0.75 * mean(dense.megabytes)
    assert sum(dense.hits) >= 5, "the model answers at all"
    assert sum(right.hits) >= sum(dense.hits) - 1 and sum(wrong.hits) <= 3
    assert mean(right.nll) < mean(dense.nll) + 0.1 and mean(wrong.nll) > mean(right.nll) + 0.3
    assert console.file.getvalue().count("  expected ") == 4
