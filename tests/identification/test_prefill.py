"""``identify_prefill`` and its command: the best pattern of every head by a slow definition, resumed, and at work."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
from helpers.tiny import SLIDING, config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_longctx import (
    ConfigError,
    LongCtxConfig,
    UnsupportedModelError,
    identify_prefill,
    patch_model,
    report,
    unpatch_model,
)
from hf_longctx.assets import asset
from hf_longctx.commands._app import app
from hf_longctx.layout.scores import Scores
from hf_longctx.model.modules import state_of
from hf_longctx.prefill.base import BLOCK, select
from hf_longctx.prefill.block_topk import BlockTopk
from hf_longctx.prefill.vertical_slash import VerticalSlash

MODULE = importlib.import_module("hf_longctx.identification.prefill")
CANDIDATES = (VerticalSlash(60, 1), VerticalSlash(5, 2), VerticalSlash(5, 60), BlockTopk(1), BlockTopk(2), BlockTopk(4))
LENGTH, COST = 700, 0.55  # eleven blocks, the last one short


def made(family: str = "llama", **kwargs):
    """(model in float64, tokenizer, config with a low ``min_tokens``): 4 query heads share 2 KV heads."""
    tokenizer = byte_bpe()
    model = tiny_model(family, dtype=torch.float64, kv_heads=2, **kwargs)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer, config_for(model, "mixed", prefill={"min_tokens": 256})


def search(model, tokenizer, config, **kwargs) -> LongCtxConfig:
    asked = {"length": LENGTH, "cost": COST, "candidates": CANDIDATES} | kwargs
    return identify_prefill(model, tokenizer, config=config, **asked)


@pytest.fixture
def seen(monkeypatch):
    """The (q, k, scores) of every layer that was measured, in order."""
    calls, measure = [], MODULE.measure

    def record(candidates, q, k, scores, blocks):
        calls.append((q, k, scores))
        return measure(candidates, q, k, scores, blocks)

    monkeypatch.setattr(MODULE, "measure", record)
    return calls


def slow(spec, q, k, scaling, queries=slice(None)) -> list[tuple[float, float]]:
    """(kept mass, density) of every head, from the whole matrix and by counting block by block."""
    total, group = q.shape[2], q.shape[1] // k.shape[1]
    hidden = torch.ones(total, total, dtype=torch.bool).triu(1)
    lists, out = select((spec,) * q.shape[1], q, k, scaling), []
    for head in range(q.shape[1]):
        scores = (q[0, head] @ k[0, head // group].T * scaling).masked_fill(hidden, float("-inf")).softmax(-1)
        mass = (scores * lists.visible()[0, head])[queries].sum(-1).mean().item()
        blocks, columns, read = lists.block_mask()[0, head], lists.column_mask()[0, head].nonzero()[:, 0].tolist(), 0
        for i in range(lists.key_blocks):
            single = sum(1 for j in columns if j < i * BLOCK and not blocks[i, j // BLOCK])
            read += int(blocks[i].sum()) * BLOCK + single
        out.append((mass, read / BLOCK / (lists.key_blocks * (lists.key_blocks + 1) / 2)))
    return out


def brute_force(calls, cost: float) -> list[list]:
    """The best candidate of every head of every layer."""
    best = []
    for q, k, scores in calls:
        table = [slow(spec, q, k, scores.scale) for spec in CANDIDATES]
        row = []
        for head in range(q.shape[1]):
            fits = [i for i in range(len(CANDIDATES)) if table[i][head][1] <= cost]
            row.append(CANDIDATES[max(fits, key=lambda i: (round(table[i][head][0], 12), -table[i][head][1]))])
        best.append(row)
    return best


def patterns(config: LongCtxConfig) -> list[list]:
    table = config.prefill.tables["searched"]
    return [[table.budgets[index] for index in row] for row in table.map]


def test_every_head_gets_the_best_candidate_within_the_cost(seen):
    model, tokenizer, config = made()
    found = search(model, tokenizer, config)
    assert len(seen) == 3 and seen[0][0].shape == (1, 4, LENGTH, 8) and seen[0][1].shape[1] == 2
    want = brute_force(seen, COST)
    assert patterns(found) == want
    assert len({spec for row in want for spec in row}) > 1, "a choice among one would show nothing"
    assert patterns(found) != brute_force(seen, 1.0), "a control: the cost must bind"
    each = [
        slow(spec, q, k, scores.scale)[head]
        for (q, k, scores), row in zip(seen, want, strict=True)
        for head, spec in enumerate(row)
    ]
    mass, density = np.array(each).T
    source = found.prefill.tables["searched"].source
    assert density.max() <= COST and "note" not in source
    assert source["mean_kept_mass"] == pytest.approx(mass.mean(), abs=1e-4)
    assert source["mean_density"] == pytest.approx(density.mean(), abs=1e-4)
    assert (source["length"], source["query_blocks"], source["cost"], source["seed"]) == (LENGTH, 11, COST, 0)


def test_the_mass_is_a_mean_over_the_queries_of_the_blocks_that_were_drawn():
    q, k = torch.randn(1, 4, LENGTH, 8).double(), torch.randn(1, 2, LENGTH, 8).double()
    blocks = [3, 10]
    queries = torch.cat([torch.arange(192, 256), torch.arange(640, LENGTH)])
    kept, density = MODULE.measure(CANDIDATES, q, k, Scores(0.7), blocks)
    want = torch.tensor([slow(spec, q, k, 0.7, queries) for spec in CANDIDATES], dtype=torch.float64)
    every = torch.tensor([slow(spec, q, k, 0.7) for spec in CANDIDATES], dtype=torch.float64)
    assert (kept - want[..., 0]).abs().max() < 1e-12 and (density - want[..., 1]).abs().max() < 1e-12
    assert (kept - every[..., 0]).abs().max() > 1e-3, "a control"


def test_equal_mass_goes_to_the_cheaper_and_no_fit_to_the_cheapest():
    kept = torch.tensor([[0.9, 0.9, 0.2, 0.5], [0.9, 0.8, 0.3, 0.6], [0.1, 0.7, 0.4, 0.6]])
    density = torch.tensor([[0.2, 0.3, 0.6, 0.5], [0.1, 0.1, 0.7, 0.4], [0.1, 0.1, 0.8, 0.4]])
    assert MODULE.choose(kept, density, 0.25) == [1, 1, 0, 1]


def test_heads_over_the_cost_are_told(caplog):
    source = search(*made(), cost=0.01).prefill.tables["searched"].source
    assert source["over_cost"] == 12 and source["note"].startswith("12 of 12 query heads") and "cheapest" in caplog.text


def test_default_candidates_grow_with_length_and_cost():
    specs = MODULE.default_candidates(32768, 0.2)
    assert len(specs) == 24 and {type(one) for one in specs} == {VerticalSlash, BlockTopk}
    assert not any(spec.reads_all for spec in specs)
    twice = MODULE.default_candidates(65536, 0.2)
    assert max(one.vertical for one in twice[:20]) == 2 * max(one.vertical for one in specs[:20]) == 9830
    assert MODULE.default_candidates(32768, 0.4) == twice
    assert len(set(MODULE.default_candidates(128, 0.01))) == len(MODULE.default_candidates(128, 0.01)) >= 2


def test_the_seed_decides_everything(seen):
    model, tokenizer, config = made(layers=2)
    one, same, other = (search(model, tokenizer, config, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other
    assert torch.equal(seen[0][0], seen[2][0]) and not torch.equal(seen[0][0], seen[4][0])


def test_the_table_survives_a_file_and_runs(tmp_path):
    model, tokenizer, config = made()
    found = search(model, tokenizer, config)
    assert found.heads == config.heads and found.stores == config.stores and found.prefill.min_tokens == 256
    found.to_yaml(tmp_path / "my.yaml")
    assert LongCtxConfig.from_yaml(tmp_path / "my.yaml") == found
    patch_model(model, tmp_path / "my.yaml")
    model(torch.randint(3, 90, (1, 512)), use_cache=False)
    ran = report(model)
    assert (ran.sparse, ran.dense) == (3, 0) and 0 < ran.density < 1
    again = search(model, tokenizer, "auto")
    assert again == found, "auto is the model's own config, whose table is replaced"
    assert state_of(model).config == found and report(model).sparse == 3


@pytest.mark.parametrize("family", SLIDING)
def test_every_family_is_searched_and_left_as_it_was(family):
    model, tokenizer, config = made(family, layers=2)
    model.train()
    assert len(patterns(search(model, tokenizer, config))) == 2
    assert state_of(model) is None and model.training


def test_layers_with_a_window_of_their_own_are_left_out(seen):
    model, tokenizer, config = made("qwen3", sliding=32, layers=4)
    found = search(model, tokenizer, config)
    assert len(seen) == 2 and found.prefill.tables["searched"].map[1] == (0, 0, 0, 0)
    patch_model(model, found)


# Going on.


class Interrupt(Exception):
    """Stands in for what ends a long run."""


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, monkeypatch, seen):
    model, tokenizer, config = made()
    whole = search(model, tokenizer, config)
    measure, left = MODULE.measure, [2]

    def fails(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupt
        return measure(*args)

    monkeypatch.setattr(MODULE, "measure", fails)
    with pytest.raises(Interrupt):
        search(model, tokenizer, config, work=tmp_path / "new" / "work")
    assert state_of(model) is None
    files = list((tmp_path / "new" / "work").iterdir())
    assert [file.name for file in files] == [MODULE.FILE] and set(json.loads(files[0].read_text())["layers"]) == {
        "0",
        "1",
    }
    monkeypatch.setattr(MODULE, "measure", measure)
    seen.clear()
    assert search(model, tokenizer, config, work=tmp_path / "new" / "work") == whole and len(seen) == 1
    seen.clear()
    assert search(model, tokenizer, config, work=tmp_path / "new" / "work") == whole and not seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": 0.6}, r"other settings: cost \(was 0.55, is 0.6\)"),
        ({"seed": 1}, "other settings: .*seed"),
        ({"length": 640}, "other settings: length"),
        ({"candidates": CANDIDATES[:2]}, "other settings: candidates"),
    ],
)
def test_the_work_of_another_search_is_refused(change, message, tmp_path, seen):
    model, tokenizer, config = made(layers=1)
    search(model, tokenizer, config, work=tmp_path)
    seen.clear()
    with pytest.raises(ConfigError, match=message):
        search(model, tokenizer, config, work=tmp_path, **change)
    other = made(layers=1)[0]
    with pytest.raises(ConfigError, match="other settings: model"):
        search(other, tokenizer, config, work=tmp_path)
    assert not seen


@pytest.mark.parametrize("spoil", ["not json", "[]", "index", "short", "name"])
def test_a_work_file_that_is_something_else_is_refused(spoil, tmp_path, seen):
    model, tokenizer, config = made(layers=1)
    search(model, tokenizer, config, work=tmp_path)
    file = tmp_path / MODULE.FILE
    saved = json.loads(file.read_text())
    layer = saved["layers"]["0"]
    if spoil == "index":
        layer["choice"][0] = len(CANDIDATES)
    elif spoil == "short":
        layer["mass"].pop()
    elif spoil == "name":
        del layer["density"]
    file.write_text(json.dumps(saved) if spoil in ("index", "short", "name") else spoil)
    seen.clear()
    with pytest.raises(ConfigError, match="is no state of identify_prefill"):
        search(model, tokenizer, config, work=tmp_path)
    assert not seen


# The prompt and the arguments.


def test_the_users_text_is_read(tmp_path, seen):
    model, tokenizer, config = made(layers=1)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, says the note. " * 40)
    found = search(model, tokenizer, config, text=tmp_path / "text.txt")
    assert found.prefill.tables["searched"].source["text"] == "given"
    search(model, tokenizer, config)
    assert seen[0][0].shape == seen[1][0].shape and not torch.equal(seen[0][0], seen[1][0])
    default = search(model, tokenizer, config, text=tmp_path / "text.txt", length=None)
    tokens = default.prefill.tables["searched"].source["length"]
    assert LENGTH < tokens == seen[2][0].shape[2] < 4096
    with pytest.raises(ConfigError, match=rf"text: it has {tokens} tokens, fewer than the prompt \(length=4000\)"):
        search(model, tokenizer, config, text=tmp_path / "text.txt", length=4000)
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(ConfigError, match="fewer than the prompt"):
        search(model, tokenizer, config, text=tmp_path / "text.txt", length=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": 0.0}, "cost: got 0.0"),
        ({"cost": 1.5}, "cost: got 1.5"),
        ({"cost": "0.2"}, "cost: got '0.2'"),
        ({"length": 64}, "length: got 64"),
        ({"seed": -1}, "seed: got -1"),
        ({"candidates": []}, "candidates: got"),
        ({"candidates": {"pattern": "block_topk"}}, "candidates: got"),
        ({"candidates": [{"pattern": "block_topkk"}]}, r"candidates\[0\].pattern: .*block_topk"),
        ({"candidates": [{"pattern": "block_topk", "top_k": 0}]}, r"candidates\[0\].top_k: got 0"),
        ({"candidates": [BlockTopk(2), {"pattern": "dense"}]}, r"candidates\[1\]: .*a sparse pattern"),
        ({"candidates": [{"pattern": "sink_recent"}]}, r"candidates\[0\].pattern: 'sink_recent' serves streaming"),
        ({"text": "no/such/file.txt"}, "cannot be read"),
        ({"config": "no-such-config"}, "no-such-config"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, message, seen):
    model, tokenizer, config = made(layers=1)
    with pytest.raises(ConfigError, match=message):
        search(model, tokenizer, **({"config": config} | arguments))
    assert not seen and state_of(model) is None


def test_other_models_and_tokenizers_are_refused(seen):
    from transformers import GPT2Config, GPT2LMHeadModel

    model, tokenizer, config = made(layers=1)
    with pytest.raises(UnsupportedModelError):
        identify_prefill(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=199)), tokenizer)
    with pytest.raises(ConfigError, match="no shipped config fits"):
        identify_prefill(model, tokenizer, length=LENGTH)
    model.resize_token_embeddings(97)
    with pytest.raises(ConfigError, match="its ids reach"):
        search(model, tokenizer, config_for(model, "mixed"))
    assert not seen


def test_weights_that_are_no_numbers_are_refused():
    model, tokenizer, config = made(layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] = float("nan")
    with pytest.raises(ConfigError, match="attention weights of layer 0 are nan or inf"):
        search(model, tokenizer, config)


# A trained model, and the command.


def test_the_heads_that_look_for_single_keys_get_columns():
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-llama"))
    found = identify_prefill(model, tokenizer, length=2048, cost=0.3, candidates=None)
    assert all(type(spec) is VerticalSlash for spec in patterns(found)[1]), "by ablation layer 1 has retrieval heads"
    blocks = [{"pattern": "block_topk", "top_k": k} for k in (2, 3, 4)]
    worse = identify_prefill(model, tokenizer, length=2048, cost=0.3, candidates=blocks)
    both = [one.prefill.tables["searched"].source["mean_kept_mass"] for one in (found, worse)]
    assert both[0] > both[1]
    unpatch_model(model)


def run(*arguments):
    return CliRunner().invoke(app, ["identify-prefill", *map(str, arguments)])


def test_the_command_writes_a_config_and_goes_on(tmp_path, seen):
    out = tmp_path / "new" / "my.yaml"
    asked = ("hf-longctx/tiny-llama", "--out", out, "--length", 1024, "--cost", "0.5", "--device", "cpu")
    done = run(*asked)
    assert done.exit_code == 0, done.output
    config = LongCtxConfig.from_yaml(out)
    source = config.prefill.tables["searched"].source
    assert config.prefill.retrieval.table == "searched" and config.model.ids == ("hf-longctx/tiny-llama",)
    shown = " ".join(done.output.split())
    assert f"They keep {source['mean_kept_mass']:.1%} of the attention mass" in shown and "vertical_slash" in shown
    assert len(seen) == 4 and (tmp_path / "new" / "my.work" / MODULE.FILE).exists()
    out.unlink()
    assert run(*asked).exit_code == 0 and len(seen) == 4 and LongCtxConfig.from_yaml(out) == config
    patch_model(AutoModelForCausalLM.from_pretrained(asset("tiny-llama")), out)
    other = run(*asked[:-4], "--cost", "0.4")
    assert other.exit_code == 2 and "other settings" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf-longctx/tiny-lama"], "no embedded model 'tiny-lama'"),
        (["hf-longctx/tiny-llama", "--cost", "2"], "cost: got 2.0"),
        (["hf-longctx/tiny-llama", "--dtype", "foo"], "--dtype: got 'foo'"),
        (["hf-longctx/tiny-llama", "--config", "no-such"], "no-such"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(arguments, message, tmp_path):
    out = tmp_path / "my.yaml"
    done = run(*arguments, "--out", out)
    assert done.exit_code == 2 and message in " ".join(done.output.split()) and not out.exists()
