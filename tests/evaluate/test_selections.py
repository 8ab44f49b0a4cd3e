"""A selection in a config file reaches what measures and shows a model, and a sweep varies its fields."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import compare, compare_prompts, report
from hf_longctx.assets import embedded
from hf_longctx.commands._app import app
from hf_longctx.commands._demo import ways
from hf_longctx.prompts.chat import Chat

MODEL = "hf-longctx/tiny-llama"
FEW = "{select: page_bounds, page: 8, budget: 256, sink: 4, recent: 16, min_tokens: 256, dense_layers: 0}"
SWEEP = "decode.retrieval.budget=8"


@pytest.fixture(scope="module")
def loaded():
    folder = embedded(MODEL)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def few(tmp_path):
    (tmp_path / "few.yaml").write_text(f"extends: tiny-llama\ndecode: {{retrieval: {FEW}}}\n", "utf-8")
    return str(tmp_path / "few.yaml")


@pytest.fixture
def text(loaded):
    generator = torch.Generator().manual_seed(0)
    return loaded[1].decode(torch.randint(8, 90, (700,), generator=generator))


def test_eval_reads_it_from_a_file_and_sweeps_it(few, tmp_path):
    out = tmp_path / "results"
    command = ["eval", MODEL, "--config", few, "--tasks", "needle", "--lengths", "512", "--depths", "0", "--out", out]
    done = CliRunner().invoke(app, [*map(str, command), "--samples", "1", "--sweep", SWEEP, "--answers", "forced"])
    assert done.exit_code == 0, done.output
    lines = (out / "records-0.jsonl").read_text("utf-8").splitlines()
    found = {line["variant"]: line["expected_nll"] for line in map(json.loads, lines) if "variant" in line}
    assert found.keys() == {"dense", "patched", SWEEP} and found["patched"] != found[SWEEP]


def test_compare_follows_an_answer_by_it(loaded, few, text):
    model, tokenizer = loaded
    prompts = [{"prompt": text, "answer": "use even than it must even an all used"}]
    found = compare_prompts(model, prompts, tokenizer=tokenizer, config=few, sweep=SWEEP)
    patched, fewer = (found.variants[name] for name in ("patched", SWEEP))
    assert patched.nll != fewer.nll
    plain = compare_prompts(model, prompts, tokenizer=tokenizer, sweep="decode.retrieval.select=page_bounds")
    nll = {name: one.nll for name, one in plain.variants.items()}
    assert nll["decode.retrieval.select=page_bounds"] == nll["patched"], "a control: its min_tokens is 4096"
    prompt = {"rounds": 0, "max_new_tokens": 2, "tokenizer": tokenizer}
    one, other = (compare(model, text, config=config, **prompt).prompt for config in (few, "auto"))
    assert one.kl == other.kl, "a prompt is read as without it"


def test_chat_and_demo_take_it(loaded, few, text):
    model, tokenizer = loaded
    read = {}
    for config in (few, "auto"):
        chat = Chat(model, tokenizer, config, max_new_tokens=4, do_sample=False)
        chat.say(text, lambda _: None)
        read[config] = report(model).read
        chat.use(False)
    assert read["auto"] is None and 0 < read[few] < 1
    chosen = [way.config.decode.retrieval.reads_all for way in ways(model, few) if way.config is not None]
    assert chosen == [False, False]
