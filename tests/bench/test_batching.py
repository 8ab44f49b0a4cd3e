"""``hf-longctx bench batching``: what it asks, that answers are compared first, and what it says. No timing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from typer.testing import CliRunner

from hf_longctx import LongCtxError
from hf_longctx.assets import embedded
from hf_longctx.bench import batching
from hf_longctx.bench.batching import COLUMNS, BatchingCase
from hf_longctx.commands._app import app
from hf_longctx.commands._options import load_model
from hf_longctx.errors import ConfigError

MODEL = "hf-longctx/tiny-llama"
SMALL = ["--tokens", "90", "--requests", "3", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]


def invoke(*args):
    return CliRunner().invoke(app, ["bench", "batching", MODEL, *SMALL, *map(str, args)], env={"COLUMNS": "80"})


def test_all_columns_answer_the_same_requests(tmp_path, monkeypatch):
    asked, plain = [], batching.continuous
    monkeypatch.setattr(batching, "continuous", lambda *given: asked.append(given[2]) or plain(*given))
    done = invoke("--json", tmp_path / "b.json", "--page", 32)
    assert done.exit_code == 0, done.output
    assert [list(map(len, prompts)) for prompts in asked] == [[90, 68, 45]] * 3
    data = json.loads((tmp_path / "b.json").read_text())
    (result,) = data["results"]
    assert tuple(result["columns"]) == COLUMNS and result["same"] == 1.0
    assert result["retrieval_heads"] == 8 and result["kv_heads"] == 16 and data["settings"]["threads"] == 1
    token = 2 * 4 * 32 * 16  # bytes of every head
    assert result["bytes_dense"] == token * (90 + 68 + 45 + 3 * 2)
    assert all(len(figures["raw_ms"]) == 1 for figures in result["columns"].values())
    assert "100% of the tokens are those of generate() alone" in " ".join(done.output.split())
    assert max(len(line) for line in done.output.splitlines() if "│" in line) <= 80


def test_other_answers_are_not_timed(monkeypatch):
    def wrong(case, model, prompts, look=None):
        found = plain(case, model, prompts, look)
        return [[answer[0] + 1, *answer[1:]] for answer in found]

    plain = batching.continuous
    monkeypatch.setattr(batching, "continuous", wrong)
    monkeypatch.setattr(batching, "turns", lambda *given: pytest.fail("timed"))
    done = invoke()
    assert done.exit_code == 2 and "3 of 3 requests another first token" in done.output


def test_a_request_that_fails_is_an_error(monkeypatch):
    small = ContinuousBatchingConfig(page_size=4, num_blocks=2, max_batch_tokens=64)
    monkeypatch.setattr(BatchingCase, "batching", lambda self, lengths: small)
    case = BatchingCase((90,), requests=1, new=2)
    model, _ = load_model(embedded(MODEL), "float32", torch.device("cpu"))
    with (
        batching._patched(case, model),
        pytest.raises(LongCtxError, match="a request ended in an error: .* not enough pages"),
    ):
        batching.continuous(case, model, [list(range(3, 90))])


@pytest.mark.quick
def test_lengths_and_what_is_refused():
    assert BatchingCase((100,), requests=3).lengths(100) == [100, 75, 50]
    assert BatchingCase((100,), requests=1).lengths(100) == [100]
    for wrong in ({"tokens": (1,)}, {"tokens": ()}, {"dtypes": ("fp8",)}, {"dtypes": ()}):
        with pytest.raises(ConfigError):
            BatchingCase(**{"tokens": (9,), **wrong})
