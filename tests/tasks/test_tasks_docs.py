"""The prompts printed in docs/tasks.md are what the tasks make."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from helpers.kinds import language_of, tokenizer_of
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM

from hf_longctx.assets import asset
from hf_longctx.config.words import words
from hf_longctx.tasks import task_from
from hf_longctx.tasks.language import HAYSTACKS, language_for
from hf_longctx.tasks.metrics import METRICS

DOC = Path(__file__).parents[2].joinpath("docs", "tasks.md").read_text("utf-8")
EXAMPLES = {
    "passkey": 420,
    "needle:variant=multi_key:needles=2": 520,
    "facts:kind=built:facts=2": 520,
    "key_value": 410,
    "threading:hops=3": 560,
    "variable_tracking:hops=2": 560,
    "common_words:words=2:count=4:others=1": 380,
    "frequent_words:words=2": 480,
}  # case: tokens, of a tokenizer whose tokens are bytes


def example(case: str, language=None) -> tuple[str, tuple[str, ...]]:
    language = language or language_for(byte_bpe(259))
    depth = 0.5 if task_from(case).deep else None
    sample = task_from(case).make(language, EXAMPLES.get(case, 60), depth, seed=0)
    question = sample.questions[0]
    return f"{language.decode(sample.context)} {language.decode(question.prompt)}", question.answers


def flat(text: str) -> str:
    return " ".join(text.split())


BLOCKS = {
    match[1]: (flat(match[2]), match[3])
    for match in re.finditer(r"`([^`\n]+)`\n\n```text\n(.+?)\n```\n\nAnswers?: ([^\n]+)\n", DOC, re.DOTALL)
}


def test_every_example_is_on_the_page():
    assert set(BLOCKS) == {*EXAMPLES, "needle"}
    assert {one.partition(":")[0] for one in EXAMPLES} <= set(words("tasks.synthetic"))


@pytest.mark.parametrize("case", BLOCKS)
def test_an_example_is_what_the_task_makes(case):
    text, answers = example(case, language_of("tiny") if case == "needle" else None)
    assert BLOCKS[case] == (flat(text), ", ".join(answers))


def test_every_field_metric_and_haystack_is_named():
    for word in {one.partition(":")[0] for one in BLOCKS}:
        row = next(line for line in DOC.splitlines() if line.startswith(f"| `{word}`"))
        named = {field.name for field in dataclasses.fields(task_from(word))} - {"metric"}
        assert set(re.findall(r"`(\w+)`", row.split("|")[3])) >= named
    assert all(f"`{name}`" in DOC for name in (*METRICS, *HAYSTACKS))


def test_the_code_of_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.+?)```", DOC, re.DOTALL)
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()
    capsys.readouterr()
    exec(code, {"tokenizer": tokenizer_of("tiny"), "model": model})
    shares = ast.literal_eval(capsys.readouterr().out)
    assert len(shares) == 8 and sum(shares) >= 7
