"""lm-evaluation-harness on a patched model, through the command line, on local tasks over the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_longctx import ConfigError, LongCtxConfig, UnsupportedModeError, patch_model, patched, report
from hf_longctx.assets import asset
from hf_longctx.commands._app import main
from hf_longctx.config.config import load_shipped
from hf_longctx.evaluate import lm_eval
from hf_longctx.evaluate.lm_eval import LongCtxLM
from hf_longctx.model.modules import state_of
from hf_longctx.tasks.tiny_language import VOCAB, Filler, exam

TINY = "hf-longctx/tiny-llama"  # its streaming heads keep 4 + 64 tokens
LENGTHS = (230, 300, 221, 262)  # tokens of a document: different ones, so that batches are padded
RIGHT, WRONG = ["SSSS", "RRRR", "SSSS", "SSSS"], ["SSSS", "SSSS", "SSSS", "RRRR"]
ALL = {"heads": {"retrieval_fraction": 1.0}}
PATTERN = {"pattern": "vertical_slash", "vertical": 16, "slash": 64}  # estimated from a row's last queries
TASKS = {
    "notes_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "notes_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "notes_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "notes_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{whole}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def document(length: int) -> dict:
    """A text with four notes and a question about one of them; the other answers are the wrong choices."""
    ids, where = exam(np.random.default_rng(length), Filler(), 1, length, 4)
    words = [VOCAB[i] for i in ids[0]]
    answers = [" ".join(words[at] for at in places) for places in where[0]]
    text = " ".join(words[: where[0, 0, 0]])
    return {"text": text, "answer": answers[0], "choices": answers, "whole": " ".join(words)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(document(length)) + "\n" for length in LENGTHS))
    local = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        data = {"task": name, "dataset_path": "json", "dataset_kwargs": local, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return folder


@pytest.fixture
def command(monkeypatch):
    """Run ``hf-longctx lm-eval ...`` in this process: its exit code."""
    for name, value in (("LMEVAL_LOG_LEVEL", "ERROR"), ("TOKENIZERS_PARALLELISM", "false")):
        monkeypatch.setenv(name, value)

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hf-longctx", "lm-eval", *args])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    return run


@pytest.fixture
def quick(monkeypatch):
    """Without what makes lm-eval slow: reading its 14,000 task files, and asking pip for versions."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture
def evaluate(command, quick, folder, tmp_path):
    """Run the tasks with a model: (what it answered, lm-eval's results)."""

    def run(model: str, batch_size: str | int = 4, tasks: tuple[str, ...] = tuple(TASKS), **model_args):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        pretrained = TINY if model == "hf-longctx" else str(asset("tiny-llama"))
        given = json.dumps({"pretrained": pretrained, "max_length": 320, **model_args})
        args = ["run", "--model", model, "--model_args", given, "--tasks", ",".join(tasks), "--device", "cpu"]
        args += ["--include_path", str(folder), "--batch_size", str(batch_size), "--max_batch_size", "2"]
        assert command(*args, "--log_samples", "--output_path", str(out)) == 0
        answers = {}
        for task in tasks:
            (found,) = out.rglob(f"samples_{task}_*.jsonl")
            rows = sorted(map(json.loads, found.read_text().splitlines()), key=lambda row: row["doc_id"])
            answers[task] = [row["resps"] for row in rows]
            assert len(rows) == len(LENGTHS)
        (found,) = out.rglob("results_*.json")
        return answers, json.loads(found.read_text())

    return run


def numbers(answers: dict) -> list[float]:
    """Every log-likelihood of every task but notes_generate."""
    found = [answers[task] for task in ("notes_choice", "notes_likelihood", "notes_rolling")]
    logs = [one for rows in found for row in rows for instance in row for one in instance]
    return [float(one[0] if isinstance(one, list) else one) for one in logs]


def loaded(**kwargs) -> LongCtxLM:
    return LongCtxLM(TINY, **{"device": "cpu", "max_length": 400, **kwargs})


def whole(lm: HFLM, length: int) -> tuple[None, list[int], list[int]]:
    """A request for the log-likelihood of a document after its first token."""
    ids = lm.tok_encode(document(length)["whole"])
    return None, ids[:1], ids[1:]


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_dense_and_all_retrieval_give_the_numbers_of_hf(evaluate, batch_size):
    stock, results = evaluate("hf", batch_size)
    dense, dense_results = evaluate("hf-longctx", batch_size, longctx=False)
    full, full_results = evaluate("hf-longctx", batch_size, longctx_overrides=ALL)
    auto, auto_results = evaluate("hf-longctx", batch_size)
    assert len(numbers(stock)) == len(LENGTHS) * (4 + 1 + 1)
    assert dense == stock and dense_results["results"] == results["results"]
    assert full["notes_generate"] == stock["notes_generate"]
    assert numbers(full) == pytest.approx(numbers(stock), abs=2e-4)
    gaps = np.abs(np.subtract(numbers(auto), numbers(stock)))
    assert gaps.max() > 1, "a control: streaming heads must show in texts longer than their window"
    assert auto_results["results"]["notes_generate"]["exact_match,none"] == 1
    assert dense_results["config"]["longctx"] is False
    for found, heads in ((full_results, 16), (auto_results, 4)):
        ran = found["config"]["longctx"]["report"]
        assert (ran["kv_heads"], ran["retrieval_heads"]) == (16, heads)
        assert ran["forwards"] > 0 and ran["kernels"]


def test_the_wrong_heads_cannot_answer(evaluate, tmp_path):
    config = load_shipped("tiny-llama")
    assert list(config.roles()) == RIGHT
    config.override(heads={"roles": WRONG}).to_yaml(tmp_path / "wrong.yaml")
    tasks = ("notes_generate", "notes_choice")
    _, right = evaluate("hf-longctx", tasks=tasks, longctx="tiny-llama")
    _, wrong = evaluate("hf-longctx", tasks=tasks, longctx=str(tmp_path / "wrong.yaml"))
    scores = [
        (found["results"]["notes_generate"]["exact_match,none"], found["results"]["notes_choice"]["acc,none"])
        for found in (right, wrong)
    ]
    assert scores[0] == (1, 1)
    assert scores[1][0] < 1 and scores[1][1] < 1
    assert LongCtxConfig.from_dict(wrong["config"]["longctx"]["config"]).roles() == tuple(WRONG)


def test_a_log_likelihood_is_that_of_the_patched_model_alone():
    lm = loaded(batch_size=4)
    requests = [whole(lm, length) for length in (80, *LENGTHS)]
    found = [log for log, _ in lm._loglikelihood_tokens(requests)]
    plain = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()

    @torch.no_grad()
    def alone(context: list[int], answer: list[int]) -> float:
        logits = plain(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

    dense = [alone(context, answer) for _, context, answer in requests]
    with patched(plain):
        assert found == pytest.approx([alone(context, answer) for _, context, answer in requests], abs=1e-4)
    assert np.abs(np.subtract(found, dense)).min() > 0.01, "a control: all these texts are longer than the window"
    with patched(plain, stores={"streaming": {"recent": 400}}):
        assert dense == pytest.approx([alone(context, answer) for _, context, answer in requests], abs=1e-4)


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_rows_that_a_pattern_reads_are_not_padded(batch_size):
    lm = loaded(max_batch_size=4)
    patch_model(lm.model, prefill={"min_tokens": 256, "retrieval": PATTERN})
    requests = [whole(lm, length) for length in (150, 380, 200, 300, 340)]  # two of them too short for the pattern
    alone = [lm._loglikelihood_tokens([one])[0] for one in requests]
    before, lm.batch_size_per_gpu = report(lm.model).sparse, batch_size
    together = lm._loglikelihood_tokens(requests)
    assert lm.batch_size == batch_size
    assert report(lm.model).sparse - before == 3, "three rows in the one layer with retrieval heads"
    logs, want = [log for log, _ in together], [log for log, _ in alone]
    assert logs == pytest.approx(want, abs=1e-4)
    lm.batch_size_per_gpu = 4
    padded = [log for log, _ in HFLM._loglikelihood_tokens(lm, requests)]
    assert padded != pytest.approx(want, abs=1e-2), "a control: pads change what the pattern reads"


def test_rows_with_a_dense_tail_are_not_padded():
    lm = loaded(batch_size=4, longctx_overrides={"prefill": {"streaming": {"dense_tail": 100}}})
    ids = lm.tok_encode(document(400)["whole"])
    lengths = (126, 380, 60, 200)  # two of them too short for a tail
    requests = [(("", ""), ids[-length:-20], ids[-20:]) for length in lengths]
    want = [lm._loglikelihood_tokens([one])[0][0] for one in requests]
    forwards = report(lm.model).forwards
    together = [log for log, _ in lm._loglikelihood_tokens(requests)]
    assert report(lm.model).forwards - forwards == 3, "the short ones together"
    assert together == pytest.approx(want, abs=1e-4)
    padded = [log for log, _ in HFLM._loglikelihood_tokens(lm, requests)]
    assert padded != pytest.approx(want, abs=1e-2), "a control: pads are the end of a row"


def test_one_token_answers_to_one_long_context_are_one_row():
    lm = loaded(batch_size=4, longctx_overrides={"prefill": {"min_tokens": 256, "retrieval": PATTERN}})
    context = lm.tok_encode(document(300)["text"])
    before = report(lm.model).forwards
    answers = lm._loglikelihood_tokens([(("", str(word)), context, [word]) for word in range(9, 13)])
    assert len({log for log, _ in answers}) == 4
    assert report(lm.model).forwards == before + 1


def test_overrides_in_both_spellings():
    spelled = loaded(longctx_overrides={"heads": {"retrieval_fraction": 0.5}, "stores": {"streaming": {"recent": 32}}})
    dotted = loaded(**{"longctx.heads.retrieval_fraction": 0.5, "longctx.stores.streaming.recent": 32})
    mixed = {"heads": {"retrieval_fraction": 0.5}}
    both = loaded(longctx_overrides=mixed, **{"longctx.stores.streaming.recent": 32, "longctx.kernel": "stock"})
    assert mixed == {"heads": {"retrieval_fraction": 0.5}}
    configs = [state_of(lm.model).config for lm in (spelled, dotted, both)]
    assert configs[0] == configs[1] != load_shipped("tiny-llama")
    assert configs[2] == configs[0].override(kernel="stock") != configs[0]
    assert "".join(configs[0].roles()).count("R") == 8 and configs[0].stores.streaming.recent == 32


def test_overrides_on_the_command_line(command, folder, tmp_path):
    args = ["--model", "hf-longctx", "--tasks", "notes_generate", "--include_path", str(folder), "--device", "cpu"]
    given = f"pretrained={TINY},longctx=tiny-llama,longctx.heads.retrieval_fraction=0.5"
    assert command(*args, "--model_args", given, "--output_path", str(tmp_path / "out")) == 0
    (found,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text())
    assert results["config"]["longctx"]["report"]["retrieval_heads"] == 8
    assert results["results"]["notes_generate"]["exact_match,none"] == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"longctx": "tiny-lama"}, "tiny-llama"),
        ({"longctx": 0.25}, "got 0.25"),
        ({"longctx_overrides": "heads"}, "expected a mapping"),
        ({"longctx_overrides": {"head": {"retrieval_fraction": 0.5}}}, "heads"),
        ({"longctx_overrides": {"model": {}}}, "one of: heads"),
        ({"longctx.heads.retrieval_fractio": 0.5}, "retrieval_fraction"),
        ({"longctx.heads": 0.5, "longctx.heads.retrieval_fraction": 0.5}, "already say"),
        ({"longctx_overrides": ALL, "longctx.heads.retrieval_fraction": 0.5}, "already say"),
        ({"longctx": False, "longctx_overrides": ALL}, "dense model"),
        ({"longctx": "none", "longctx.kernel": "stock"}, "dense model"),
        ({"pretrained": "hf-longctx/tiny-gpt"}, "no embedded model"),
    ],
)
def test_what_is_wrong_is_an_error(given, says):
    with pytest.raises(ConfigError, match=says):
        LongCtxLM(**{"pretrained": TINY, "device": "cpu", **given})


def test_a_loaded_model_is_patched_in_place():
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()
    assert state_of(LongCtxLM(model, longctx=None).model) is None
    patch_model(model, heads={"retrieval_fraction": 0.5})
    assert report(LongCtxLM(model).model).retrieval_heads == 8, "auto keeps the model's own config"
    assert LongCtxLM(model, longctx=True, longctx_overrides=ALL).model is model
    assert report(model).retrieval_heads == 16
    assert LongCtxLM(model, longctx="None").get_model_info()["longctx"] is False
    assert state_of(model) is None


def test_an_adapter(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    lm, without = loaded(peft=str(tmp_path)), loaded()
    assert isinstance(lm.model, PeftModel) and report(lm.model).retrieval_heads == 4
    requests = [whole(lm, 230)]
    assert lm._loglikelihood_tokens(requests) != without._loglikelihood_tokens(requests)
    assert report(lm.model).forwards == 1


def test_a_mode_that_is_refused_says_so(command, quick, folder, capsys):
    args = ["run", "--model", "hf-longctx", "--model_args", f"pretrained={TINY}", "--tasks", "notes_generate"]
    args += ["--include_path", str(folder), "--device", "cpu", "--gen_kwargs", "cache_implementation=static"]
    assert command(*args) == 2
    said = capsys.readouterr().err
    assert UnsupportedModeError.__name__ in said and "cache_implementation='static'" in said


def test_arguments_are_handed_on_as_they_are(command, monkeypatch):
    seen = []
    monkeypatch.setattr(lm_eval, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    given = ["run", "--help", "-x", "--", "a b", "--tasks=t", "-L", "5", "-vs"]
    before = sys.argv
    assert command(*given) == 0
    assert seen == [given]
    assert sys.argv == ["hf-longctx", "lm-eval", *given] != before, "argv was put back as the command found it"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--help"], 0, "usage: lm-eval"),
        ([], 0, "usage: lm-eval"),
        (["run", "--help"], 0, "--model_args"),
        (["run", "--nonsense"], 2, "--nonsense"),
        (["validate", "--tasks", "notes_rolling,none_such"], 1, "none_such"),
    ],
)
def test_help_and_exit_codes_are_those_of_lm_eval(command, quick, folder, capsys, args, code, says):
    args = [*args, "--include_path", str(folder)] if "validate" in args else args
    assert command(*args) == code
    said = capsys.readouterr()
    assert says in said.out + said.err


def test_the_model_is_registered_beside_lm_evals_own():
    assert get_model("hf-longctx") is LongCtxLM
    assert get_model("hf") is HFLM


def test_without_lm_eval_the_command_says_what_to_install():
    script = """
    import sys
    class Missing:
        def find_spec(name, path=None, target=None):
            if name == "lm_eval":
                raise ModuleNotFoundError("No module named 'lm_eval'", name=name)
    sys.meta_path.insert(0, Missing)
    sys.argv[1:] = ["lm-eval", "--help"]
    from hf_longctx.commands._app import main
    main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]  # torchao, where it is there, says more as it is imported
    assert said.startswith("ConfigError") and "pip install -e '.[eval]'" in said and "Traceback" not in done.stderr
