"""Perplexity by position: sums to the last token, and a loss only where streaming heads no longer see everything."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from helpers.eval_cases import plan_of, records_of
from helpers.tiny import config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from rich.console import Console

from hf_longctx import ConfigError
from hf_longctx.assets import BOOK
from hf_longctx.commands.eval import show
from hf_longctx.evaluate import run
from hf_longctx.evaluate.forwards import windows
from hf_longctx.evaluate.positions import by_position, spans_of, table_of
from hf_longctx.evaluate.prompts import perplexity_text
from hf_longctx.evaluate.run import evaluate
from hf_longctx.evaluate.summary import summarize

WINDOW = 700
EDGES = [(0, 256), (256, 512), (512, 1024)]


def sums(losses: dict[int, float]) -> list[dict]:
    """Spans of losses by position, by their definition."""
    return [
        {"begin": begin, "end": end, "nll": sum(inside), "tokens": len(inside)}
        for begin, end in [(0, 256), *((2**i, 2 ** (i + 1)) for i in range(8, 20))]
        if (inside := [loss for position, loss in losses.items() if begin <= position < end])
    ]


@pytest.mark.parametrize("tokens", [1, 100, 255, 256, 257, 511, 512, 4095, 4096, 5000])
def test_losses_are_summed_by_their_positions(tokens):
    losses = {position: float(position * position) for position in range(1, tokens + 1)}
    found = by_position(torch.tensor(list(losses.values()), dtype=torch.float64))
    assert found == sums(losses), "squares: a token in the wrong span changes both sums"
    assert sum(part["tokens"] for part in found) == tokens
    assert json.loads(json.dumps(found)) == found


def test_the_edges():
    assert [part["tokens"] for part in by_position(torch.ones(255))] == [255], "the first token of all has no loss"
    assert [part["tokens"] for part in by_position(torch.ones(256))] == [255, 1]
    assert [part["tokens"] for part in by_position(torch.ones(1))] == [1]
    found = by_position(torch.ones(4095))
    assert [(part["begin"], part["end"]) for part in found] == [*EDGES, (1024, 2048), (2048, 4096)]
    spans = spans_of({"dense": [{"by_position": found}]})
    assert [span.name for span in spans] == ["0-256", "256-512", "512-1k", "1k-2k", "2k-4k"]


def test_windows_are_taken_together_and_each_variant_by_itself():
    long, short = torch.full((300,), 2.0), torch.full((100,), 1.0)
    records = {
        name: [{"by_position": by_position(factor * losses)} for losses in (long, short)]
        for name, factor in (("dense", 1), ("patched", 3))
    }
    first, second = spans_of(records)
    assert (first.tokens, second.tokens) == (355, 45)
    assert [first.cells[name].nll for name in records] == [610, 1830]
    assert [second.cells[name].nll for name in records] == [90, 270]
    names, rows = table_of((first, second))
    assert names == ["position", "tokens", "dense", "patched"]
    assert rows[1] == ["256-512", "45", f"{math.exp(2):.4g}", f"{math.exp(6):.4g}"]
    assert spans_of({}) == spans_of({"dense": [{"nll": 1.0, "tokens": 2}]}) == ()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(model, arguments of ``evaluate``): streaming heads that see all of the first 256 tokens, and no more."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["batob", "cafoc", "dahod", "fakog", "galob", "hapoc"]
    path.write_text(" ".join(random.Random(0).choices(words, k=1100)))
    model = tiny_model()
    model.resize_token_embeddings(700)
    heads = config_for(model, sink=4, recent=252)
    few = {"tasks": "passkey", "lengths": [400], "depths": [0.5], "samples": 1}
    return model, few | {"config": heads, "perplexity": path, "perplexity_window": WINDOW}


@pytest.fixture(scope="module")
def done(asked, tmp_path_factory):
    """(folder, summary) of a whole run."""
    out = tmp_path_factory.mktemp("out")
    return out, evaluate(asked[0], byte_bpe(), out, **asked[1])


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "records-0.jsonl").read_text().splitlines()[1:]]


@torch.no_grad()
def test_dense_spans_are_those_of_the_logits(asked, done):
    model, given = asked
    ids = torch.tensor(byte_bpe()(given["perplexity"].read_text())["input_ids"])
    by = {}
    for begin, _, end in windows(len(ids), WINDOW, WINDOW // 2):
        likely = model(ids[None, begin:end]).logits[0].double().log_softmax(-1)
        for i in range(begin + 1, end):
            by.setdefault(i - begin, []).append(-likely[i - 1 - begin, ids[i]].item())
    want = sums({position: sum(losses) for position, losses in by.items()})
    spans = done[1].perplexity_by_position
    assert [(span.begin, span.end) for span in spans] == EDGES
    assert [span.cells["dense"].nll for span in spans] == pytest.approx([part["nll"] for part in want], rel=1e-5)
    counts = [sum(len(by[p]) for p in range(max(1, begin), min(end, WINDOW))) for begin, end in EDGES]
    assert [span.tokens for span in spans] == counts and len(by[1]) > 2, "every window begins at position 1"
    whole = sum(record["tokens"] for record in lines(done[0]) if record["case"].startswith("text")) // 2
    assert whole == len(ids) - 1 < sum(counts), "the total counts every token once"


def test_streaming_heads_lose_beyond_their_window_alone(done):
    first, *beyond = done[1].perplexity_by_position
    dense, other = (first.cells[name].nll / first.tokens for name in ("dense", "patched"))
    assert other == pytest.approx(dense, abs=1e-5)
    for span in beyond:
        dense, other = (span.cells[name].nll / span.tokens for name in ("dense", "patched"))
        assert abs(other - dense) > 1e-3, span.name


@pytest.mark.parametrize("kept", [3, 4])
def test_a_run_that_goes_on_keeps_its_spans(asked, done, tmp_path, monkeypatch, kept):
    whole = (done[0] / "records-0.jsonl").read_bytes().splitlines(keepends=True)
    assert len(whole) > kept + 2 and b'"text ' in whole[kept]
    (tmp_path / "records-0.jsonl").write_bytes(b"".join(whole[: 1 + kept]))
    ran = []
    real = run.by_position
    monkeypatch.setattr(run, "by_position", lambda losses: ran.append(len(losses)) or real(losses))
    again = evaluate(asked[0], byte_bpe(), tmp_path, **asked[1])
    assert again.perplexity_by_position == done[1].perplexity_by_position
    windowed = [record for record in lines(done[0]) if record["case"].startswith("text")]
    assert len(ran) == len(windowed) - sum(b'"text ' in line for line in whole[: 1 + kept])
    assert (tmp_path / "report" / "perplexity-position.png").exists()


@pytest.mark.parametrize(
    "names", [("dense", "patched"), ("dense", "patched", *(f"stores.recent={i}" for i in range(5)))]
)
def test_the_table_of_the_command_fits_80_columns(names):
    plan = plan_of(names)
    summary = summarize(plan, records_of(plan))
    said = io.StringIO()
    show(Console(width=80, file=said), summary, BOOK.parent)
    table = said.getvalue().partition("perplexity by position")[2].partition("patched: <script>")[0]
    assert max(map(len, table.splitlines())) <= 80
    rows = [re.findall(r"[^\s│┃]+", line) for line in table.splitlines()]
    heads, first, last = (
        [cell for row in rows if row[:1] == [key] for cell in row[2:]] for key in ("position", "0-256", "256-512")
    )
    assert heads == list(names)
    assert first == ["7.105"] * len(names)
    assert last == [f"{math.exp(2 + 0.2 * v):.4g}" for v in range(len(names))]


def test_the_book_goes_by_a_word_unless_a_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert perplexity_text("book", byte_bpe()) == BOOK.read_text("utf-8")
    (tmp_path / "book").write_text("of a user's own")
    assert perplexity_text("book", byte_bpe()) == perplexity_text(Path("./book"), byte_bpe()) == "of a user's own"
    with pytest.raises(ConfigError, match="perplexity: books cannot be read"):
        perplexity_text("books", byte_bpe())
