"""The real checkpoint with its shipped map: a cell of eval, a table of speed, and the demo as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hf_longctx.assets import OWNER, REAL
from hf_longctx.commands._app import app
from hf_longctx.config.config import load_shipped
from hf_longctx.model.checkpoint import real_checkpoint

pytestmark = pytest.mark.slow

MODEL = f"{OWNER}/{REAL}"


def command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module", autouse=True)
def converted():
    """Converted once, before anything is timed or printed."""
    return real_checkpoint()


def test_a_cell_of_eval(tmp_path):
    forced = ["--answers", "forced", "--haystack", "book", "--chat", "--dtype", "bfloat16"]
    cell = ["--tasks", "facts:facts=8", "--lengths", "2k", "--depths", "", "--samples", "2"]
    command("eval", MODEL, *cell, *forced, "--sweep", "retrieval_fraction=0", "--out", str(tmp_path))
    found = json.loads((tmp_path / "summary.json").read_text())
    dense, patched, none = found["overall"]["cells"].values()
    shipped = load_shipped(REAL)
    heads = [shipped.retrieval_heads, shipped.kv_heads], [0, shipped.kv_heads]
    assert tuple(found["header"]["retrieval_heads"].values()) == heads
    assert dense["cases"] == patched["cases"] == 2  # texts, with eight questions each
    assert none["cache_share"] < patched["cache_share"] < dense["cache_share"] == 1
    assert dense["nll"] < 0.6 and patched["nll"] < dense["nll"] + 0.15
    assert none["nll"] > patched["nll"] + 0.5, "a control: no head reads the text"
    assert none["agreement"] < patched["agreement"]


def test_a_table_of_speed_at_its_sizes(tmp_path):
    sizes = load_shipped(REAL).model
    shape = ["--layers", sizes.num_hidden_layers, "--heads", sizes.num_attention_heads]
    shape += ["--kv-heads", sizes.num_key_value_heads, "--head-dim", sizes.head_dim]
    out = tmp_path / "e2e.json"
    said = command(
        "bench", "e2e", *map(str, shape), "--tokens", "512", "--dtype", "fp32", "--rounds", "1", "--json", str(out)
    )
    (result,) = json.loads(out.read_text())["results"]
    assert result["error"] < 1e-4 and len(result["roles"]) == 30
    assert {"stock", "all retrieval", "half streaming", "all streaming"} <= set(result["columns"])
    assert "half streaming" in said


def test_the_demo_as_a_user_types_it():
    said = command("demo", "--real", "--length", "1024", "--notes", "2", "--prompts", "1")
    assert said.count("  expected ") == 2 and max(map(len, said.splitlines())) <= 80
    shipped = load_shipped(REAL)
    assert said.count(f"{shipped.retrieval_heads} of {shipped.kv_heads}") == 2, "patched and the wrong heads"
