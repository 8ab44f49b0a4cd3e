"""examples/compare_heads.py and heads_tables.py: orders, areas, tables, and what is measured again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.scripts import script

from hf_longctx.assets import asset
from hf_longctx.config.config import load_shipped

NAME = "tiny-llama"
TASK = "needle:variant=multi_key:needles=4:questions=4"


@pytest.fixture
def maps(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    load_shipped(NAME).to_yaml(folder / "ablation.yaml")
    return folder


def row(order: str, share: float, nll: list[float], right: list[bool], seed: int = 0, **changes) -> dict:
    return {
        **{"tokens": 2048, "task": "facts", "seed": seed, "order": order, "share": share, "dense_tail": 0},
        **{"together": False, "nll": nll, "right": right, **changes},
    }


def cell_of(rows: list[dict]):
    return script("heads_tables").Cell(rows)


def test_an_order_takes_its_best_heads_and_keeps_the_files_stores(maps):
    orders = script("compare_heads").Orders.read(maps, random=2)
    assert list(orders.scores) == ["ablation", "random 0", "random 1"]
    scores = np.array(load_shipped(NAME).scores)
    for share in (0.0, 0.3, 1.0):
        config = orders.config("ablation", share, dense_tail=64)
        letters = np.array([list(row) for row in config.roles()])
        assert (letters == "R").sum() == int(share * scores.size + 0.5)
        assert scores[letters == "R"].min(initial=2) >= scores[letters == "S"].max(initial=-1)
        assert config.stores == load_shipped(NAME).stores and config.prefill.streaming.dense_tail == 64
    assert (orders.scores["random 0"] != orders.scores["random 1"]).any()


def test_files_that_keep_other_tokens_are_not_compared(maps, tmp_path):
    read = script("compare_heads").Orders.read
    load_shipped(NAME).override(stores={"streaming": {"recent": 32}}).to_yaml(maps / "other.yaml")
    with pytest.raises(SystemExit, match="keep different tokens"):
        read(maps)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="holds no .yaml"):
        read(tmp_path / "none")


def test_the_area_is_a_mean_height_over_the_shares():
    curve = {0.1: 4.0, 0.5: 2.0, 0.9: 1.0}
    cell = cell_of(
        [row("dense", 1.0, [0.5], [True]), *(row("a", share, [nll], [False]) for share, nll in curve.items())]
    )
    assert cell.area("nll", "a") == pytest.approx((3.0 + 1.5) / 2)
    assert cell.area("right", "a") == 0 and cell.mean("nll", "dense") == 0.5
    assert cell_of([row("a", 0.5, [1.0], [True])]).area("nll", "a") is None


def test_an_area_is_of_the_texts_that_everything_was_measured_on():
    rows = [row(order, share, [1.0], [True]) for order in ("dense", "a") for share in (0.1, 0.5)]
    rows += [row("dense", 0.5, [9.0], [True], seed=1), row("a", 0.5, [9.0], [True], seed=1)]
    cell = cell_of(rows)
    assert cell.everywhere == {0} and cell.area("nll", "a") == 1 and cell.mean("nll", "a", 0.5) == 5
    assert cell_of(rows[3:]).area("nll", "a") is None


def test_a_loss_is_paired_with_the_same_questions():
    dense = [row("dense", 1.0, [1.0, 3.0], [True, True]), row("dense", 1.0, [50.0, 70.0], [True, True], seed=1)]
    cell = cell_of([*dense, row("a", 0.5, [1.5, 3.5], [True, False])])
    assert cell.lost("a", 0.5) == "+0.500 [+0.500, +0.500]"


def test_the_tables_have_the_best_order_first_and_one_line_for_chance():
    shares = (0.3, 0.5)
    rows = [row("dense", 1.0, [0.1, 0.2], [True, True])]
    for order, nll in (("worse", 0.9), ("better", 0.4), ("random 0", 2.0), ("random 1", 1.5)):
        rows += [row(order, share, [nll, nll], [True, False]) for share in shares]
    cell = cell_of(rows)
    for lines in (script("heads_tables").table(cell, 0.5), script("heads_tables").by_share(cell)):
        names = [line.split()[1] for line in lines if not line.startswith("|-")]
        assert names == ["order", "dense", "better", "worse", "best"]
        assert len({len(line) for line in lines}) == 1 and "| best of 2 random | 1.500 " in lines[-1]
    at_half = script("heads_tables").table(cell, 0.5)
    assert "+0.250 [+0.200, +0.300]" in at_half[3] and "+1.350 [+1.300, +1.400]" in at_half[-1]
    assert "| 0.400 | 0.400 |" in script("heads_tables").by_share(cell)[3]


def test_it_goes_on_where_it_stopped_and_does_more_when_asked(maps, tmp_path, capsys):
    compare, out, picture = script("compare_heads"), tmp_path / "curves.jsonl", tmp_path / "curves.png"
    asked = [str(asset(NAME)), "--maps", str(maps), "--out", str(out), "--tasks", TASK, "--tokens", "256"]
    asked += ["--contexts", "1", "--shares", "0.3", "0.9", "--random", "1"]
    compare.main(asked)
    first = out.read_text()
    found = [json.loads(line) for line in first.splitlines()]
    assert [(one["order"], one["share"]) for one in found] == [
        *[("dense", 1.0), ("ablation", 0.3), ("random 0", 0.3), ("ablation", 0.9), ("random 0", 0.9)]
    ]
    assert all(len(one["nll"]) == len(one["right"]) == 4 for one in found)
    nll = {(one["order"], one["share"]): sum(one["nll"]) for one in found}
    assert nll["ablation", 0.3] < nll["random 0", 0.3], "a control: the order matters"
    compare.main(asked)
    assert out.read_text() == first
    compare.main([*asked, "--together"])
    assert len(out.read_text().splitlines()) == 10 and out.read_text().startswith(first)
    capsys.readouterr()
    script("heads_tables").main([str(out), "--plot", str(picture)])
    said = capsys.readouterr().out
    assert "of copies of the context's cache" in said and "in one forward with the context" in said
    assert picture.stat().st_size > 10_000
