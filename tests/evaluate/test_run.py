"""``evaluate`` and ``hf-longctx eval``: what they report is what the model does, and nothing is computed twice."""

from __future__ import annotations

import json
import sys
from statistics import mean, median

import pytest
import torch
from helpers.kinds import COUNTED, DRAWN
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import ConfigError, patch_model, patched, unpatch_model
from hf_longctx.assets import asset
from hf_longctx.cache.fingerprint import weights_digest
from hf_longctx.commands._app import app
from hf_longctx.evaluate import run
from hf_longctx.evaluate.forwards import perplexity
from hf_longctx.evaluate.measures import paired_bootstrap
from hf_longctx.evaluate.records import Writer
from hf_longctx.evaluate.run import evaluate
from hf_longctx.model.modules import state_of
from hf_longctx.tasks import task_from
from hf_longctx.tasks.answer import MODES, answer
from hf_longctx.tasks.language import language_for
from hf_longctx.tasks.tiny_language import VOCAB

ASKED = {"tasks": "needle,key_value:questions=2", "lengths": [256, 512], "depths": [0, 0.5], "samples": 2}
SWEEP = "retrieval_fraction=0.0625,1"
VARIANTS = ("dense", "patched", "retrieval_fraction=0.0625", "retrieval_fraction=1")
TIMES = ("prefill_s", "decode_ms")


@pytest.fixture(scope="module")
def llama():
    path = asset("tiny-llama")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(VOCAB[10 + i * i % 80] for i in range(600)))
    return path


@pytest.fixture(scope="module")
def done(llama, text, tmp_path_factory):
    """(folder, summary) of a whole run."""
    out = tmp_path_factory.mktemp("eval")
    return out, evaluate(*llama, out, sweep=SWEEP, perplexity=text, perplexity_window=300, **ASKED)


def lines(out) -> tuple[list[dict], list[dict]]:
    """(headers, records) of a folder."""
    read = [json.loads(line) for path in sorted(out.glob("records-*.jsonl")) for line in path.read_text().splitlines()]
    return [one for one in read if "settings" in one], [one for one in read if "case" in one]


def untimed(thing):
    """Plain data without what differs from run to run."""
    if isinstance(thing, dict):
        return {key: untimed(value) for key, value in thing.items() if key not in (*TIMES, "started", "processes")}
    return [untimed(one) for one in thing] if isinstance(thing, (list, tuple)) else thing


def in_order(records) -> list[dict]:
    return sorted(untimed(records), key=lambda one: (one["variant"], one["case"]))


def test_the_right_heads_lose_nothing_and_the_wrong_ones_do(done):
    _, summary = done
    assert summary.variants == VARIANTS
    cells = summary.overall.cells
    assert [cell.cases for cell in cells.values()] == [16] * 4
    assert cells["dense"].accuracy >= 0.9
    assert abs(cells["patched"].accuracy - cells["dense"].accuracy) <= 0.07
    assert cells["retrieval_fraction=0.0625"].accuracy <= 0.3
    assert cells["retrieval_fraction=0.0625"].difference.high < -0.3
    assert cells["retrieval_fraction=0.0625"].agreement < 0.7 < 0.9 < cells["patched"].agreement
    all_heads = cells["retrieval_fraction=1"]
    assert (all_heads.accuracy, all_heads.agreement) == (cells["dense"].accuracy, 1.0)
    assert all_heads.kl_max < 1e-6 < cells["retrieval_fraction=0.0625"].kl


def test_every_case_is_recorded_once_with_everything(done):
    out, _ = done
    (header,), records = lines(out)
    cases = [one for one in records if "task" in one]
    assert len(cases) == 2 * 2 * 2 * 2 * 4
    assert len({(one["variant"], one["case"]) for one in records}) == len(records)
    assert len({one["seed"] for one in cases}) == 2 * 2 * 2 * 2, "the same for every variant"
    assert header["settings"]["version of torch"] == torch.__version__
    assert set(header["configs"]) == set(VARIANTS)
    assert header["configs"]["retrieval_fraction=1"]["heads"]["retrieval_fraction"] == 1
    assert header["retrieval_heads"]["patched"] == [4, 16]
    assert header["sweep"] == SWEEP and header["environment"]["threads"] == torch.get_num_threads()
    assert all(len(one["outputs"]) == len(one["expected"]) == (1 if one["task"] == "needle" else 2) for one in cases)


@torch.no_grad()
def test_recorded_answers_and_bytes_are_the_models(llama, done):
    model, tokenizer = llama
    language = language_for(tokenizer)
    _, records = lines(done[0])
    for record in [one for one in records if one.get("length") == 512 and one["depth"] == 0][:8]:
        sample = task_from(record["task"]).make(language, 512, 0.0, record["seed"])
        with patched(model, done_config(done, record["variant"])) if record["variant"] != "dense" else torch.no_grad():
            said = answer(model, sample)
        assert record["output_ids"] == said
        assert record["outputs"] == [language.decode(ids) for ids in said]
        scores = [question.score(text) for question, text in zip(sample.questions, record["outputs"], strict=True)]
        assert (record["scores"], record["score"]) == (scores, mean(scores))


def done_config(done, variant) -> dict:
    return lines(done[0])[0][0]["configs"][variant]


def test_the_summary_is_what_the_records_say(done):
    out, summary = done
    _, records = lines(out)
    by_depth = {(row.task, row.length, row.depth): row.cells for row in summary.by_depth}
    assert len(by_depth) == 8
    for rows, fields in ((summary.by_depth, ("task", "length", "depth")), (summary.by_task, ("task", "length"))):
        for row in rows:
            for name, cell in row.cells.items():
                own, dense = (
                    [
                        one
                        for one in records
                        if one["variant"] == way and "task" in one and all(one[f] == getattr(row, f) for f in fields)
                    ]
                    for way in (name, "dense")
                )
                assert [one["case"] for one in own] == [one["case"] for one in dense]
                assert cell.cases == len(own) == 2 * (2 if fields == ("task", "length") else 1)
                assert cell.accuracy == mean(one["score"] for one in own)
                assert cell.cache_bytes == mean(one["cache_bytes"] for one in own)
                assert cell.cache_share == pytest.approx(cell.cache_bytes / mean(one["cache_bytes"] for one in dense))
                assert cell.prefill_s == median(one["prefill_s"] for one in own)
                assert cell.decode_ms == median(one["decode_ms"] for one in own)
                if name == "dense":
                    assert (cell.difference, cell.agreement, cell.kl) == (None, None, None)
                    continue
                positions = [one["positions"] for one in own]
                kl = sum(one["kl"] * n for one, n in zip(own, positions, strict=True)) / sum(positions)
                assert (cell.positions, cell.kl) == (sum(positions), pytest.approx(kl))
                assert cell.difference == paired_bootstrap(*([one["score"] for one in way] for way in (dense, own)))
    assert [row.length for row in summary.by_length] == [256, 512]
    assert summary.by_length[0].cells["dense"].cases == 8
    assert json.loads((out / "summary.json").read_text())["overall"] == json.loads(
        json.dumps(summary.as_dict()["overall"])
    )


def test_the_likelihood_of_expected_answers_tells_heads_apart(done):
    _, summary = done
    cells = summary.overall.cells
    assert cells["dense"].nll < 0.3 and cells["dense"].nll_difference is None
    assert abs(cells["patched"].nll_difference.difference) < 0.1
    wrong = cells["retrieval_fraction=0.0625"]
    assert wrong.nll_difference.low > 1 and wrong.right <= 0.3 < 0.9 <= cells["dense"].right
    assert wrong.nll_difference.difference == pytest.approx(wrong.nll - cells["dense"].nll)
    _, records = lines(done[0])
    own = [one for one in records if one["variant"] == "patched" and "task" in one]
    means = [mean(map(float.__truediv__, one["expected_nll"], map(float, one["expected_tokens"]))) for one in own]
    assert cells["patched"].nll == pytest.approx(mean(means))
    assert cells["patched"].right == mean(mean(one["expected_right"]) for one in own)


def test_forced_answers_decode_nothing_and_score_the_same_likelihood(llama, done, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_longctx.tasks.answer.Reader.ask", lambda *_: pytest.fail("something was decoded"))
    asked = ASKED | {"tasks": "needle", "lengths": [256]}
    summary = evaluate(*llama, tmp_path, sweep="retrieval_fraction=0.0625", answers="forced", **asked)
    greedy = next(row for row in done[1].by_task if (row.task, row.length) == ("needle", 256))
    for name, cell in summary.overall.cells.items():
        assert (cell.nll, cell.right) == pytest.approx((greedy.cells[name].nll, greedy.cells[name].right), abs=1e-4)
        assert cell.accuracy == cell.right and cell.decode_ms is None
        assert cell.cache_bytes == greedy.cells[name].cache_bytes
    cells = summary.overall.cells
    assert cells["retrieval_fraction=0.0625"].kl > 0.1 > cells["patched"].kl
    assert all("outputs" not in one for one in lines(tmp_path)[1])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "nothing decoded" in page and "What was said" not in page
    with pytest.raises(ConfigError, match="other settings: answers"):
        evaluate(*llama, tmp_path, sweep="retrieval_fraction=0.0625", **asked)


def test_perplexity_is_that_of_the_whole_text(llama, text, done):
    model, tokenizer = llama
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0]
    want = perplexity(model, ids, window=300, context=150).value
    assert done[1].perplexity["dense"] == pytest.approx(want, rel=1e-6)
    with patched(model, "auto"):
        assert done[1].perplexity["patched"] == pytest.approx(perplexity(model, ids, window=300, context=150).value)
    assert done[1].perplexity["retrieval_fraction=1"] == pytest.approx(want, rel=1e-4)
    assert done[1].perplexity["retrieval_fraction=0.0625"] != pytest.approx(want, rel=1e-3), "a control"


@pytest.fixture
def counted(monkeypatch):
    """The prompts that were run, one entry per variant, warm-up included."""
    ran = []
    real = run.answers_of

    def counting(model, sample, *rest):
        ran.append((state_of(model) is not None, sample.metadata["seed"]))
        return real(model, sample, *rest)

    monkeypatch.setattr(run, "answers_of", counting)
    return ran


def test_a_finished_run_runs_nothing_again(llama, done, text, counted):
    out, summary = done
    before = (out / "records-0.jsonl").read_bytes()
    assert evaluate(*llama, out, sweep=SWEEP, perplexity=text, perplexity_window=300, **ASKED) == summary
    assert counted == []
    assert (out / "records-0.jsonl").read_bytes() == before


FEW = {"tasks": "needle", "lengths": [64, 128], "depths": [0, 1], "samples": 2, "sweep": "retrieval_fraction=0.5"}


@pytest.fixture(scope="module")
def few(llama, tmp_path_factory):
    """(folder, summary) of a run of 24 results."""
    out = tmp_path_factory.mktemp("few")
    return out, evaluate(*llama, out, **FEW)


@pytest.mark.parametrize("after", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6)), 14])
def test_an_interrupted_run_goes_on(llama, few, tmp_path, monkeypatch, counted, after):
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    real, written = Writer.append, []

    def interrupted(self, record):
        if "case" in record:
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(record)
        real(self, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "append", interrupted)
        evaluate(*llama, tmp_path / "cut", **FEW)
    assert state_of(llama[0]) is None
    counted.clear()
    again = evaluate(*llama, tmp_path / "cut", **FEW)
    left = 24 - after
    assert len(counted) == 3 + left + bool(after % 3), (
        "a warm-up each, what is left, and dense where the others follow it"
    )
    assert untimed(again.as_dict()) == untimed(few[1].as_dict())
    assert in_order(lines(tmp_path / "cut")[1]) == in_order(lines(few[0])[1])


def test_another_run_in_the_same_folder_is_refused(llama, done, text):
    asked = ASKED | {"sweep": SWEEP, "perplexity": text, "perplexity_window": 300}
    others = [
        {"samples": 3},
        {"seed": 1},
        {"tasks": "needle"},
        {"sweep": None},
        {"config": "tiny-llama", "mode": "turns"},
    ]
    for other in [*others, {"perplexity": None, "perplexity_window": None}]:
        with pytest.raises(ConfigError, match="other settings"):
            evaluate(*llama, done[0], **(asked | other))
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="other settings: model"):
        evaluate(model, llama[1], done[0], **asked)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1
    model.generation_config.eos_token_id = [6, 7]
    with pytest.raises(ConfigError, match=r"other settings: end tokens \(was \[6\], is \[6, 7\]\)"):
        evaluate(model, llama[1], done[0], **asked)


def test_another_output_layer_is_another_model():
    model = tiny_model()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = weights_digest(model, complete=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert weights_digest(model, complete=False) != before


def test_prompts_longer_than_the_model_was_made_for_are_noted(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama[0].config, "max_position_embeddings", 128)
    summary = evaluate(*llama, tmp_path, tasks="needle", lengths=[128, 129], depths=[], samples=1)
    said = "some prompts are longer than the 128 tokens that the model was made for"
    assert {name: said in notes for name, notes in summary.notes.items()} == {"dense": True, "patched": True}
    assert said in (tmp_path / "report" / "index.html").read_text()
    of = {(one["variant"], one["length"]): said in one["notes"] for one in lines(tmp_path)[1]}
    assert of == {(way, length): length > 128 for way in ("dense", "patched") for length in (128, 129)}


def test_the_model_is_left_as_it_was(llama, tmp_path):
    model, tokenizer = llama
    quick = {"tasks": "needle", "lengths": [64], "depths": [], "samples": 1}
    patch_model(model, "auto", heads={"retrieval_fraction": 0.5})
    try:
        own = state_of(model).config
        model.train()
        summary = evaluate(model, tokenizer, tmp_path, **quick)
        assert model.training and state_of(model).config == own
        header = json.loads((tmp_path / "records-0.jsonl").read_text().splitlines()[0])
        assert header["configs"]["patched"]["heads"]["retrieval_fraction"] == 0.5, "its own config, where none is given"
        assert summary.overall.cells["patched"].difference.low is None, "one case has no interval"
    finally:
        model.eval()
        unpatch_model(model)


def command(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)], env={"COLUMNS": "200"})


def test_the_command(tmp_path):
    asked = ["hf-longctx/tiny-llama", "--tasks", "needle", "--lengths", "128,256", "--depths", "0,1", "--samples", 1]
    said = command(*asked, "--sweep", "retrieval_fraction=0.0625", "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert "retrieval_fraction=0.0625" in said.output and "index.html" in said.output
    header, *_ = lines(tmp_path / "out")[0]
    assert header["model"] == "hf-longctx/tiny-llama" and header["settings"]["lengths"] == [128, 256]
    assert {path.name for path in (tmp_path / "out" / "report").iterdir()} == {
        *("index.html", "depth-needle.png", "accuracy-kv.png", "costs.png")
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tasks", "neddle"], "needle"),
        (["--tasks", "needle:metric=bleu"], "exact_match"),
        (["--lengths", "1x"], "--lengths: got"),
        (["--lengths", ""], "--lengths"),
        (["--sweep", "nothing=1"], "Sections"),
        (["--dtype", "int3"], "--dtype"),
    ],
)
def test_the_command_refuses_before_it_loads_the_model(tmp_path, monkeypatch, args, said):
    monkeypatch.setattr("hf_longctx.commands.eval.load_model", lambda *_: pytest.fail("the model was loaded"))
    given = ["hf-longctx/tiny-llama", "--tasks", "needle", "--lengths", 128, "--out", tmp_path / "out", *args]
    refused = command(*given)
    assert refused.exit_code == 2 and said in refused.output
    assert not (tmp_path / "out").exists()


def test_the_command_wants_matplotlib_before_it_loads_the_model(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_longctx.commands.eval.load_model", lambda *_: pytest.fail("the model was loaded"))
    given = ["hf-longctx/tiny-llama", "--tasks", "needle", "--lengths", 128, "--out", tmp_path / "out"]
    refused = command(*given)
    assert refused.exit_code == 2 and "matplotlib is not installed" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_every_task_runs_in_text(tmp_path, mode):
    """A task that lands later is run here too; the model is random, so its answers are wrong, alike both ways."""
    model = tiny_model(layers=2)
    model.resize_token_embeddings(700)
    heads = config_for(model, roles="retrieval")
    asked = {"lengths": [2400], "depths": [0.5], "samples": 1, "mode": mode, "prefill_chunk_size": 300}
    summary = evaluate(model, byte_bpe(), tmp_path, tasks=",".join(DRAWN), config=heads, **asked)
    assert set(summary.tasks) == set(DRAWN)
    assert {row.task for row in summary.by_depth if row.depth is None} == set(COUNTED)
    (header,), records = lines(tmp_path)
    assert header["settings"]["prefill_chunk_size"] == 300 and len(records) == 2 * len(DRAWN)
    by_way = {way: {one["case"]: one["output_ids"] for one in records if one["variant"] == way} for way in VARIANTS[:2]}
    assert by_way["dense"] == by_way["patched"], "all heads keep every token"
    assert summary.overall.cells["patched"].kl_max < 1e-5
