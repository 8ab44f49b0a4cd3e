"""Choosing blocks, timed and counted, and the whole model whose retrieval heads read some of them."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers.kernel_faults import change_attend
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxError
from hf_longctx.bench import block_lists, columns, e2e, patterns, prefill, show
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.config.words import load, words
from hf_longctx.kernels import cpu
from hf_longctx.layout.blocks import BlockList
from hf_longctx.prefill.base import select
from hf_longctx.prefill.block_topk import BlockTopk

SHAPE = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
TINY = Settings((300,), dtypes=("fp32",), densities=(), **SHAPE)
SPARSE = "half streaming + sparse 60%"
PATTERNS = [word for word in words("prefill") if load("prefill", word).roles == ("retrieval",) and word != "dense"]


def test_a_text_is_a_pattern_with_its_fields():
    (one, other) = patterns.choosers(("vertical_slash", "block_topk: top_k=3"))
    assert one.spec == load("prefill", "vertical_slash")() and one.name == "vertical_slash"
    assert other.spec == BlockTopk(top_k=3)
    assert patterns.parse("flexprefill:gamma=0.5:tau=1", "x") == {"pattern": "flexprefill", "gamma": 0.5, "tau": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense", r"patterns\[0\]: got 'dense', expected a pattern that chooses"),
        ("sink_recent", r"patterns\[0\].pattern: 'sink_recent' serves streaming heads"),
        ("blocktopk", "Did you mean 'block_topk'"),
        ("block_topk:top_k", "WORD or WORD:field=value"),
        ("block_topk:top_k=1:top_k=2", "each field once"),
        ("block_topk:pattern=dense", "each field once"),
        ("block_topk:top_k=[", "'\\[' is not a YAML value"),
        ("block_topk:top_k=many", r"patterns\[0\].top_k: got 'many', expected a whole number, at least 1"),
    ],
)
def test_a_pattern_that_is_none_is_an_error_before_anything_is_measured(text, message, monkeypatch):
    monkeypatch.setattr(prefill, "_case", lambda *args: pytest.fail("measured something"))
    with pytest.raises(ConfigError, match=message):
        prefill.run(replace(TINY, patterns=(text,)))


def test_queries_score_near_keys_higher():
    settings = replace(TINY, head_dim=64)
    torch.manual_seed(0)
    scores = {}
    for make in (patterns.local_heads, columns.random_heads):
        q, k = (make(1, 4096, settings, torch.float32)[0, 0] for _ in "qk")
        offsets = (0, 100, 300, 3000)
        scores[make] = [(q[o:] * k[: 4096 - o]).sum(-1).mean().item() / 8 for o in offsets]
    local, even = scores.values()
    assert local[0] == pytest.approx(patterns.NEAREST, rel=0.05)
    assert all(near > far + 1.5 for near, far in itertools.pairwise(local))
    assert max(map(abs, even)) < 1
    assert patterns.local_heads(2, 5, replace(TINY, head_dim=7), torch.bfloat16).shape == (1, 2, 5, 7)


def test_choosing_is_timed_and_its_density_is_that_of_the_list():
    assert {"antidiagonal", "block_topk", "flexprefill", "vertical_slash"} <= set(PATTERNS)
    given = (*PATTERNS, "block_topk:top_k=1")
    (result,) = prefill.run(replace(TINY, patterns=given))
    assert list(result["patterns"]) == list(given)
    stock = result["columns"]["stock"]["ms"]["median_ms"]
    for pattern in result["patterns"].values():
        assert len(pattern["ms"]["raw_ms"]) == TINY.rounds and min(pattern["ms"]["raw_ms"]) > 0
        assert pattern["share_of_stock"] == pattern["ms"]["median_ms"] / stock
    densities = {name: pattern["density"] for name, pattern in result["patterns"].items()}
    assert densities["block_topk"] == densities["vertical_slash"] == 1, "5 blocks are few for the defaults"
    assert densities["block_topk:top_k=1"] < 0.8
    torch.manual_seed(0)
    heads = replace(TINY, heads=4, kv_heads=2)
    for n in (4, 2, 2):
        columns.random_heads(n, 300, heads, torch.float32)
    q, k = (patterns.local_heads(n, 300, heads, torch.float32) for n in (4, 2))
    density = select((BlockTopk(top_k=1),) * 4, q, k, 16**-0.5).density
    assert result["patterns"]["block_topk:top_k=1"]["density"] == density
    printed = io.StringIO()
    show.show(Console(width=250, file=printed), show.as_json("prefill", TINY, [result]))
    assert all(f"{one['share_of_stock']:.2%}" in printed.getvalue() for one in result["patterns"].values())
    assert prefill.run(replace(TINY, patterns=()))[0]["patterns"] == {}


def test_top_k_reads_the_density_it_is_chosen_for():
    for tokens, density in ((4096, 20), (8192, 10), (8192, 30)):
        torch.manual_seed(1)
        q, k = (columns.random_heads(n, tokens, TINY, torch.float32) for n in (8, 4))
        made = [select((BlockTopk(top_k=top_k),) * 8, q, k, 1.0) for top_k in (e2e.top_k_for(density, tokens), 60)]
        assert abs(made[0].density - density / 100) < 0.015 < made[1].density - density / 100
    assert e2e.top_k_for(100, 300) == 5 and e2e.top_k_for(1, 300) == 1


def test_the_sparse_column_reads_by_blocks_and_says_how_many():
    (result,) = e2e.run(replace(TINY, density=60))
    assert list(result["columns"])[-1] == SPARSE and len(result["columns"]) == 6
    found = {name: column.get("density") for name, column in result["columns"].items()}
    least = (2 * 5 - 1) / 15  # block 0 and the own block of 5 query blocks
    assert least <= found.pop(SPARSE) < 1 and set(found.values()) == {None}
    printed = io.StringIO()
    show.show(Console(width=250, file=printed), show.as_json("e2e", TINY, [result]))
    assert f"{result['columns'][SPARSE]['density']:.1%}" in printed.getvalue()
    with pytest.raises(ConfigError, match="at least 128 tokens, given 100"):
        e2e.run(replace(TINY, tokens=(300, 100), density=60))
    with pytest.raises(ConfigError, match="density must be a percent from 1 to 100, given 0"):
        replace(TINY, density=0)


def test_every_column_computes_the_logits_of_the_last_token_alone(monkeypatch):
    shapes, turn = {}, e2e.turn

    def noted(settings, model, how, ids, prefill, decode, keep=1, steps=1):
        out = turn(settings, model, how, ids, prefill, decode, keep, steps)
        shapes.setdefault(keep, set()).add((tuple(out[0][0].shape), tuple(out[0][1].shape)))
        return out

    monkeypatch.setattr(e2e, "turn", noted)
    e2e.run(replace(TINY, density=60))
    assert shapes == {0: {((1, 300, 1024), (1, 1, 1024))}, 1: {((1, 1, 1024), (1, 1, 1024))}}


@pytest.mark.parametrize("where", ["all lists", "lists with gaps"])
def test_a_wrong_kernel_for_block_lists_is_caught_before_the_model_is_timed(where, monkeypatch):
    def wrong(q, segments, blocks):
        if where == "lists with gaps":
            return q, segments, block_lists.random_list(300, q.shape[1], 1.0, seed=0)
        (segment,) = segments
        k = segment.k[:, :, : segment.length]  # leaves the second key block out
        return q, [replace(segment, k=torch.cat([k[:, :, :64], k[:, :, :64], k[:, :, 128:]], 2))], blocks

    change_attend(monkeypatch, cpu, BlockList, wrong)
    monkeypatch.setattr(e2e, "turns", lambda *args: pytest.fail("timed columns that differ"))
    named = SPARSE.replace("+", r"\+") if where == "all lists" else "kernel cpu for block lists"
    with pytest.raises(LongCtxError, match=f"{named} differs"):
        e2e.run(replace(TINY, density=60, kernel="cpu"))


def test_the_options_reach_the_json(tmp_path):
    flags = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    common = [*flags, "--tokens", "300", "--dtype", "fp32", "--threads", "1", "--kernel", "reference"]
    own = {"prefill": ["--patterns", "block_topk:top_k=2", "--densities", ""], "e2e": ["--density", "60"]}
    for benchmark, more in own.items():
        path = tmp_path / f"{benchmark}.json"
        done = CliRunner().invoke(
            app, ["bench", benchmark, *common, *more, "--json", str(path)], env={"COLUMNS": "200"}
        )
        assert done.exit_code == 0, done.output
        data = json.loads(path.read_text())
        assert data["settings"]["kernel"] == "reference" and "kernel: reference" in done.output
        column = data["results"][0]["columns"]["all retrieval"]
        assert column["kernel"] == "reference"
        if benchmark == "prefill":
            assert list(data["results"][0]["patterns"]) == data["settings"]["patterns"] == ["block_topk:top_k=2"]
            assert "block_topk:top_k=2" in done.output
        else:
            assert data["settings"]["density"] == 60 and SPARSE in done.output
