"""``hf-longctx bench real``: which columns run on a checkpoint, that they are checked, and what is said. No timing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers.tiny import tiny_model
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from hf_longctx import LongCtxCache, LongCtxError
from hf_longctx.bench import columns, e2e, static_cache
from hf_longctx.cache.seam import cache_of
from hf_longctx.commands._app import app

MODEL = "hf-longctx/tiny-llama"
SMALL = ["--tokens", "40", "--rounds", "1", "--decode-tokens", "3", "--dtype", "fp32", "--threads", "1"]
PATCHED = ["all retrieval", "half streaming", "config"]
NAMES = ["stock", "stock static", *PATCHED]


def invoke(*args, width=80):
    return CliRunner().invoke(app, ["bench", "real", *map(str, args)], env={"COLUMNS": str(width)})


def said(done) -> str:
    """The output as one line, as far as it is no table."""
    return " ".join(done.output.split())


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(e2e, "turns", lambda *args: pytest.fail("timed columns that differ"))


@pytest.fixture
def threads(monkeypatch):
    """What torch's threads were set to, one after the other. They stay as they are: more would wait for each other."""
    found = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.fixture
def seen(monkeypatch, threads):
    """Of every turn: shape of the ids, tokens decoded, torch's threads, and the cache's class."""
    found, turn = [], e2e.turn

    def noted(settings, model, how, ids, *rest, **more):
        caches = set()
        hook = model.register_forward_hook(lambda _, args, out: caches.add(type(cache_of(out))))
        try:
            return turn(settings, model, how, ids, *rest, **more)
        finally:
            hook.remove()
            found.append((tuple(ids.shape), more.get("steps"), threads[-1], *caches))

    monkeypatch.setattr(e2e, "turn", noted)
    return found


def test_the_table_has_80_columns_and_the_json_every_raw_time(tmp_path, seen, threads):
    path = tmp_path / "out.json"
    many = ["--tokens", "140", "--batch", "1,2", "--threads", "1,2", "--dtype", "fp32,bf16", "--rounds", 2]
    done = invoke(MODEL, *many, "--decode-tokens", 3, "--json", path, "--png", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80 and done.stdout.count("┏") == 1, "one table"
    data = json.loads(path.read_text())
    cases = [(r["dtype"], r["tokens"], r["batch"], r["threads"]) for r in data["results"]]
    assert cases == [(d, 140, b, n) for d in ("fp32", "bf16") for b in (1, 2) for n in (1, 2)]
    for result in data["results"]:
        assert list(result["columns"]) == NAMES and 0 <= result["error"] <= columns.TOLERANCE[result["dtype"]]
        for name, column in result["columns"].items():
            assert (column["kernel"] == "sdpa") == (name not in PATCHED)
            for part in ("prefill", "decode"):
                assert len(column[f"{part}_ms"]["raw_ms"]) == 2 and column[f"{part}_ratio"] > 0
    assert data["model"] == MODEL and data["settings"]["layers"] == 4 and data["settings"]["batch"] == [1, 2]
    assert data["settings"]["steps"] == 3 and "hidden" not in data["settings"], "nothing of a model that was not run"
    for word in ("fp32, 140 tokens", "batch 2, 2 threads", "1 and 2 threads of", "malloc", f"{MODEL}: 4 layers"):
        assert word in said(done)
    assert "config = auto hf-longctx/tiny-llama, 4 of 16 KV heads keep every token." in said(done)
    timed = [one for one in seen if one[0][1] == 143 and one[1] == 3]
    assert {(shape, threads) for shape, _, threads, _ in timed} == {((b, 143), n) for b in (1, 2) for n in (1, 2)}
    assert {cache for *_, cache in timed} == {DynamicCache, StaticCache, LongCtxCache}
    assert threads[-1] == threads[0], "as they were before"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_cache_holds_what_is_said(tmp_path):
    path = tmp_path / "out.json"
    assert invoke(MODEL, *SMALL, "--tokens", 400, "--batch", 2, "--json", path).exit_code == 0
    (result,) = json.loads(path.read_text())["results"]
    held = {name: column["kv_bytes"] for name, column in result["columns"].items()}
    dense = 2 * 403 * 4 * 4 * 2 * 32 * 4  # sequences, tokens, layers, KV heads, k and v, head_dim, float32
    assert held["stock"] == held["stock static"] == dense <= held["all retrieval"]
    assert held["config"] < held["half streaming"] < held["all retrieval"], "4, 8 and 16 of 16 heads keep every token"


@pytest.mark.parametrize("wrong", ["all retrieval", "stock static", "half streaming"])
def test_a_column_that_answers_otherwise_is_caught_before_anything_is_timed(wrong, monkeypatch, untimed):
    update, static, patch = LongCtxCache.update, StaticCache.update, e2e.patch
    if wrong == "all retrieval":
        monkeypatch.setattr(LongCtxCache, "update", lambda cache, k, v, *a, **kw: update(cache, k, -v, *a, **kw))
    elif wrong == "stock static":
        monkeypatch.setattr(
            static_cache.StaticCache, "update", lambda cache, k, v, *a, **kw: static(cache, k, -v, *a, **kw)
        )
    else:
        narrow = {"sink": 1, "recent": 4}
        monkeypatch.setattr(e2e, "patch", lambda m, settings, **how: patch(m, replace(settings, **narrow), **how))
    done = invoke(MODEL, *SMALL)
    assert isinstance(done.exception, LongCtxError) or done.exit_code != 0
    assert f"the logits of {wrong} differs by" in said(done) and "┏" not in done.stdout


def test_more_layers_may_round_more_but_no_wrong_token_passes(monkeypatch):
    allowed = []
    check_same = e2e.check_same

    def noted(what, got, want, word, loosen=1.0):
        allowed.append(loosen)
        return check_same(what, got, want, word, loosen)

    monkeypatch.setattr(e2e, "check_same", noted)
    assert invoke(MODEL, *SMALL).exit_code == 0
    assert set(allowed) == {1.0}, "of 4 layers"
    one, other = torch.tensor([1.0, 0.9]), torch.tensor([1.0, 0.85])
    with pytest.raises(LongCtxError, match=r"differs by 5.0e-02 .* more than 3e-02"):
        check_same("x", other, one, "bf16")
    assert 0.04 < check_same("x", other, one, "bf16", 2.0) < 0.06


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "batch must be numbers of at least 1, given [0]"),
        (["--batch", ""], "batch must be numbers of at least 1, given []"),
        (["--batch", "1,x"], "'1,x' is not a list of numbers such as 1,2"),
        (["--threads", "1,0"], "threads must be numbers of at least 1, given [1, 0]"),
        (["--tokens", "8x"], "--tokens: got '8x'"),
        (["--decode-tokens", "0"], "greater than or equal to 1"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--dtype", "fp8"], "dtype fp8 is not known; known: fp32, bf16"),
        (["--kernel", "nativ"], "kernel: got 'nativ', expected one of: auto"),
        (["--config", "tiny-lama"], "Did you mean 'tiny-llama'?"),
        (["--llama-cpp", "x.gguf"], "llama-cpp-python cannot be imported here"),
    ],
)
def test_options_are_refused_before_the_checkpoint_is_loaded(args, message, monkeypatch):
    monkeypatch.setattr("hf_longctx.commands.bench.load_model", lambda *a, **kw: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = invoke(MODEL, *args, width=200)
    assert done.exit_code == 2 and message in said(done) and "Traceback" not in done.output


def test_a_checkpoint_that_is_not_there_is_one_sentence(tmp_path):
    done = invoke(tmp_path, *SMALL)
    assert done.exit_code == 2 and "ConfigError: MODEL: " in done.stderr and "cannot be loaded" in done.stderr


def saved(folder, **kwargs):
    """A folder with a random checkpoint that no shipped config fits, and without a tokenizer."""
    tiny_model(**kwargs).save_pretrained(folder)
    return folder


def test_without_a_shipped_config_its_column_is_left_out_and_it_is_said_why(tmp_path):
    folder, path = saved(tmp_path / "mine"), tmp_path / "out.json"
    done = invoke(folder, *SMALL, "--json", path)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(path.read_text())["results"]
    assert list(result["columns"]) == NAMES[:-1] and result["config"] is None
    assert "Prompts: random tokens, for want of a tokenizer." in said(done)
    assert "Not measured: config: config='auto': no shipped config fits the model" in said(done)
    assert said(done).count("Not measured") == 1
    asked = invoke(folder, *SMALL, "--config", "auto")
    assert asked.exit_code == 2 and "no shipped config fits the model" in asked.stderr and "┏" not in asked.stdout
    other = invoke(folder, *SMALL, "--config", "tiny-llama")
    assert other.exit_code == 2 and "ConfigError" in other.stderr, "made for another model"


def test_a_config_of_ones_own_and_the_kernel_of_all_patched_columns(tmp_path):
    from hf_longctx.config.config import load_shipped

    file, path = tmp_path / "my.yaml", tmp_path / "out.json"
    load_shipped("tiny-llama").override(heads={"retrieval_fraction": 0.5}).to_yaml(file)
    done = invoke(MODEL, *SMALL, "--config", file, "--kernel", "reference", "--json", path)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(path.read_text())["results"]
    assert result["config"] == {"name": str(file), "retrieval_heads": 8, "kv_heads": 16}
    assert {result["columns"][name]["kernel"] for name in PATCHED} == {"reference"}


def test_one_kv_head_cannot_be_half_streaming(tmp_path):
    done = invoke(saved(tmp_path, kv_heads=1), *SMALL)
    assert done.exit_code == 0 and "Not measured: half streaming: kv_heads must be at least 2" in said(done)
    assert "│ all retrieval" in done.stdout and "│ half streaming" not in done.stdout


def test_a_checkpoint_with_windows_of_its_own_in_some_layers(tmp_path):
    path = tmp_path / "out.json"
    done = invoke(saved(tmp_path, family="qwen2", sliding=16), *SMALL, "--json", path)
    assert done.exit_code == 0, done.output
    (result,) = json.loads(path.read_text())["results"]
    assert {*NAMES[:-1]} == {*result["columns"]} and "Prompts: random tokens" in said(done)


# llama.cpp, by a stand-in with the interface of llama-cpp-python.


class Llama:
    made: list = []

    def __init__(self, model_path, n_ctx, n_threads, n_threads_batch, verbose):
        if "broken" in model_path:
            raise ValueError(f"Failed to load model from file: {model_path}")
        self.given = (n_ctx, n_threads, n_threads_batch, verbose)
        self.read = []
        self.made.append(self)

    def n_vocab(self):
        return 199

    def reset(self):
        self.read.append([])

    def eval(self, tokens):
        self.read[-1].append(list(tokens))


@pytest.fixture
def llama(monkeypatch, tmp_path):
    module = ModuleType("llama_cpp")
    module.Llama = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(Llama, "made", [])
    file = tmp_path / "model.gguf"
    file.touch()
    return file


def test_llama_cpp_reads_the_same_prompt_with_the_same_threads(llama, tmp_path, monkeypatch, threads):
    path, turn, prompts = tmp_path / "out.json", e2e.turn, []

    def noted(settings, model, how, ids, *rest, **more):
        prompts.append(ids[0].tolist())
        return turn(settings, model, how, ids, *rest, **more)

    monkeypatch.setattr(e2e, "turn", noted)
    more = ["--batch", "1,2", "--threads", "1,2", "--rounds", 2, "--llama-cpp", llama, "--json", path]
    done = invoke(MODEL, *SMALL, *more)
    assert done.exit_code == 0, done.output
    assert [one.given for one in Llama.made] == [(43, n, n, False) for n in (1, 2)]
    for one in Llama.made:
        assert len(one.read) == 3, "once before anything is timed, and in two rounds"
        for prompt, *singles in one.read:
            assert len(prompt) == 40 and [len(single) for single in singles] == [1, 1, 1]
            assert prompt + sum(singles, []) in prompts
    results = json.loads(path.read_text())["results"]
    assert [(r["batch"], "llama.cpp" in r["columns"]) for r in results] == [
        (1, True),
        (1, True),
        (2, False),
        (2, False),
    ]
    column = results[0]["columns"]["llama.cpp"]
    assert len(column["decode_ms"]["raw_ms"]) == 2 and "kv_bytes" not in column and column["kernel"] == "ggml"
    why = "Not measured: llama.cpp, fp32 at 40, batch 2, 1 thread: llama-cpp-python reads one sequence at a time"
    assert why in said(done) and "│ llama.cpp" in done.stdout


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        ("missing.gguf", 199, "there is no file"),
        ("broken.gguf", 199, "cannot be loaded: Failed to load model from file"),
        ("other.gguf", 5, "has 5 tokens and MODEL's prompt has number"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(name, vocabulary, message, llama, tmp_path, monkeypatch, untimed):
    monkeypatch.setattr(Llama, "n_vocab", lambda self: vocabulary)
    if name != "missing.gguf":
        (tmp_path / name).touch()
    done = invoke(MODEL, *SMALL, "--llama-cpp", tmp_path / name, width=300)
    assert done.exit_code == 2 and "ConfigError: --llama-cpp: " in done.stderr and message in done.stderr


def test_without_llama_cpp_it_is_said_how_to_install_it(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = invoke(MODEL, *SMALL, "--llama-cpp", llama)
    assert done.exit_code == 2 and "pip install llama-cpp-python" in said(done)
