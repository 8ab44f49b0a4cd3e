"""``compare --prompts``: every figure is the model's own, and a bad line is named by its number."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from hf_longctx import ConfigError, compare, compare_prompts, patched
from hf_longctx.commands._app import app
from hf_longctx.evaluate import compare_prompts as module
from hf_longctx.evaluate import prompt_set_table as table
from hf_longctx.evaluate.measures import Mean, next_token, paired_bootstrap
from hf_longctx.evaluate.prompts import answer_ids, token_ids
from hf_longctx.model.modules import state_of

CHAT = (
    "{% for m in messages %}<|chat|>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|chat|>assistant\n{% endif %}"
)
TEXT = "Passkey number is bacob. Remember it. " * 6
LINES = [
    {"prompt": TEXT + "The passkey is", "answer": "bacob", "id": "short"},
    {"messages": [{"role": "user", "content": TEXT + "Which?"}], "answer": "It is bacob."},
    {"prompt": TEXT},
]


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_bpe(400)
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    made = tiny_model(dtype=torch.float64)
    made.resize_token_embeddings(len(tokenizer))
    return made


@torch.no_grad()
def test_every_figure_is_what_the_two_ways_do(model, tokenizer):
    config = config_for(model, "mixed", recent=8)
    found = compare_prompts(model, LINES, config=config, tokenizer=tokenizer, max_new_tokens=5)
    assert state_of(model) is None
    by_id = {one.id: one for one in found.prompts}
    assert set(by_id) == {"short", "2", "3"} and [by_id[k].given for k in ("short", "2", "3")] == [True, True, False]
    assert [one.lost() for one in found.prompts] == sorted((one.lost() for one in found.prompts), reverse=True)
    for name, line in zip(("short", "2", "3"), LINES, strict=True):
        one = by_id[name]
        prompt = line.get("prompt") or line["messages"]
        ids = token_ids(model, prompt, tokenizer)
        single = compare(model, prompt, config=config, tokenizer=tokenizer, max_new_tokens=5, rounds=0)
        for way in ("dense", "patched"):
            assert one.runs[way].tokens == getattr(single, way).tokens
            assert one.runs[way].cache_bytes == getattr(single, way).cache_bytes
        assert one.runs["patched"].same == single.same and one.runs["dense"].same is None
        answer = list(single.dense.tokens)
        if "answer" in line:
            answer = answer_ids(prompt, ids[0].tolist(), line["answer"], tokenizer)
        assert one.prompt_tokens == ids.shape[1] and one.answer_tokens == len(answer)
        logits = {}
        for way in ("dense", "patched"):
            whole = torch.tensor([[*ids[0].tolist(), *answer]])
            if way == "dense":
                logits[way] = model(whole).logits[0, ids.shape[1] - 1 : -1]
            else:
                with patched(model, config):
                    logits[way] = model(whole).logits[0, ids.shape[1] - 1 : -1]
            want = cross_entropy(logits[way], torch.tensor(answer)).item()
            assert one.runs[way].nll == pytest.approx(want, rel=1e-5)
        want = next_token(logits["dense"], logits["patched"])
        assert one.runs["patched"].next_token.agreement == want.agreement
        assert one.runs["patched"].next_token.kl == pytest.approx(want.kl, rel=1e-3, abs=1e-9)
    means = found.variants["patched"]
    lost = [one.lost() for one in found.prompts]
    want = paired_bootstrap([0.0] * 3, lost)
    assert (means.nll_lost.mean, means.nll_lost.low, means.nll_lost.high) == (want.difference, want.low, want.high)
    assert means.nll == pytest.approx(found.dense_nll + sum(lost) / 3) and any(lost)
    assert 0 < means.kl.mean < 5 and means.retrieval_heads == 6
    assert json.loads(json.dumps(found.as_dict()))["prompts"][0]["id"] == found.prompts[0].id


def test_an_answer_goes_on_from_the_prompt_as_it_would_be_said(model, tokenizer):
    def said(prompt, answer, own=tokenizer):
        ids = token_ids(model, prompt, own)[0].tolist()
        return own.decode(answer_ids(prompt, ids, answer, own))

    assert said("The key is", "bacob") == " bacob" == said("The key is", " bacob")
    assert said("The key is ", "bacob") == said("The key:\n", "bacob") == said('The "', "bacob") == "bacob"
    chat = [{"role": "user", "content": "which?"}]
    assert said(chat, " bacob ") == "bacob"
    spaced = copy.deepcopy(tokenizer)
    spaced.chat_template = CHAT.replace("assistant\n{% endif", "assistant{% endif").replace("\n{{", " {{")
    assert said(chat, "bacob", spaced) == " bacob", "what the template puts before an answer"
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = CHAT.replace(
        "{{ m['content'] | trim }}", "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    )
    assert said(chat, "bacob", thinking) == "bacob"


def test_a_sweep_adds_variants_and_the_worst_come_first(model, tokenizer):
    config = config_for(model, "mixed", recent=8)
    sweep = "stores.streaming.recent=2,64"
    found = compare_prompts(model, LINES, config=config, tokenizer=tokenizer, sweep=sweep, max_new_tokens=2)
    assert list(found.variants) == ["patched", "stores.streaming.recent=2", "stores.streaming.recent=64"]
    assert found.swept == {"stores.streaming.recent=2": 2, "stores.streaming.recent=64": 64}
    assert len({means.kl.mean for means in found.variants.values()}) == 3, "each is run by its own config"
    said = str(found)
    assert max(map(len, said.splitlines())) <= 80 and "2 given ones, else dense's greedy ones" in said
    worst = [line.split()[0] for line in said.split("Worst first")[1].splitlines()[2:] if not line.startswith("  ")]
    assert worst[:3] == [one.id for one in found.prompts]
    same = compare_prompts(model, LINES, config=config_for(model, "retrieval"), tokenizer=tokenizer, max_new_tokens=2)
    means = same.variants["patched"]
    assert means.agreement.mean == means.equal.mean == 1 and means.kl.mean < 1e-6 and abs(means.nll_lost.mean) < 1e-6
    assert "equal" in str(same).split("Worst first")[1] and "part after" not in str(same)


def test_chunks_and_chat_are_used(model, tokenizer, monkeypatch):
    seen = []
    real = module.answer_along
    monkeypatch.setattr(module, "answer_along", lambda *args: seen.append(args) or real(*args))
    given = {"config": config_for(model, "mixed"), "tokenizer": tokenizer, "max_new_tokens": 1}
    compare_prompts(model, [{"prompt": "Which?"}], chat=True, prefill_chunk_size=7, **given)
    want = token_ids(model, [{"role": "user", "content": "Which?"}], tokenizer)
    assert all(args[2].tolist() == want.tolist() and args[5] == 7 for args in seen) and len(seen) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: got a list"),
        ('{"anwser": "x", "prompt": "a"}', "line 3: unknown key 'anwser'.*Did you mean 'answer'"),
        ('{"answer": "x"}', "line 3: expected either prompt"),
        ('{"prompt": "a", "messages": []}', "line 3: expected either prompt"),
        ('{"prompt": 3}', "line 3: prompt: got int"),
        ('{"prompt": " "}', "line 3: prompt: got an empty text"),
        ('{"prompt": "a", "answer": ""}', "line 3: answer: got an empty text"),
        ('{"prompt": "a", "id": [1]}', "line 3: id: got list"),
        ('{"prompt": "a", "id": "q"}', "line 3: id 'q' is that of an earlier prompt"),
        ('{"messages": ["a"]}', "line 3: messages: expected a list of objects"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 3: messages: .* belongs under answer"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_before_anything_runs(
    model, tokenizer, tmp_path, monkeypatch, line, message
):
    file = tmp_path / "set.jsonl"
    file.write_text(f'{{"prompt": "one", "id": "q"}}\n\n{line}\n{{"prompt": "two"}}\n')
    monkeypatch.setattr(module, "answer_along", lambda *args: pytest.fail("ran"))
    with pytest.raises(ConfigError, match=message):
        compare_prompts(model, file, config=config_for(model, "mixed"), tokenizer=tokenizer)


def test_other_sets_are_refused(model, tokenizer, tmp_path):
    config = config_for(model, "mixed")
    for given, message in (
        ([], "prompts: got list"),
        ({"prompt": "a"}, "prompts: got dict"),
        (["a"], "prompts: got list"),
        ([{"prompt": "a"}, {"prompt": ""}], "number 2: prompt: got an empty text"),
        (tmp_path / "none.jsonl", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_prompts(model, given, config=config, tokenizer=tokenizer)
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="number 1: prompt: .*refuses these messages: roles must alternate"):
        compare_prompts(model, LINES[1:2], config=config, tokenizer=refusing)
    with pytest.raises(ConfigError, match="max_new_tokens must be"):
        compare_prompts(model, LINES, config=config, tokenizer=tokenizer, max_new_tokens=0)


def test_a_likelihood_that_is_no_number_is_named(model, tokenizer, monkeypatch):
    real = module.answer_along

    def broken(*args):
        tokens, held, states = real(*args)
        return tokens, held, states * (float("nan") if state_of(model) else 1)

    monkeypatch.setattr(module, "answer_along", broken)
    with pytest.raises(ConfigError, match="prompt short: the NLL of its answer is nan \\(patched\\)"):
        compare_prompts(model, LINES[:1], config=config_for(model, "mixed"), tokenizer=tokenizer)
    assert state_of(model) is None


# The command.


def invoke(*args: object):
    return CliRunner().invoke(app, ["compare", "hf-longctx/tiny-llama", *map(str, args)], env={"COLUMNS": "80"})


def test_the_command(tmp_path):
    words = "note amber basil cedar is apricot ivory pearl indigo . " * 12
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps({"prompt": words + extra, "id": extra}) + "\n" for extra in ("note", "ask")))
    out = tmp_path / "out.json"
    done = invoke("--prompts", file, "--max-new-tokens", 3, "--sweep", "retrieval_fraction=0.5", "--json", out)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert list(data["variants"]) == ["patched", "retrieval_fraction=0.5"] and len(data["prompts"]) == 2
    assert "Worst first, patched" in done.output and "Fewer than 6 prompts" in done.output
    assert data["environment"]["torch"] == torch.__version__


def test_the_command_takes_one_of_the_two(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("note amber")
    lines.write_text('{"prompt": "note amber"}\n')
    for args, said in (
        ((), "got neither"),
        (("--prompt-file", text, "--prompts", lines), "got both"),
        (("--prompt-file", text, "--sweep", "retrieval_fraction=0.5"), "--sweep: varies"),
        (("--prompts", lines, "--rounds", 0), "--rounds: of one prompt alone"),
        (("--prompts", lines, "--prompt-positions", 4), "--prompt-positions: of one prompt alone"),
        (("--prompts", lines, "--sweep", "retrieval_fracton=0.5"), "Did you mean"),
        (("--prompts", text), "line 1: no JSON"),
    ):
        done = invoke(*args)
        assert done.exit_code == 2 and said in done.output.replace("\n", " "), done.output


def test_intervals_stand_apart_at_80_columns():
    spans = (
        table._span(Mean(0.0, -9.5, 9.5), "+.3f"),
        table._percent(Mean(1.0, 1.0, 1.0)),
        table._span(Mean(1.0, 1.0, 9.5), ".3f"),
    )
    row = table._row(("", "95%:", *spans))
    assert all(f" {span}" in row for span in spans) and len(row) <= 80
