"""On every embedded model every identification method beats random orders, and the best one comes close to ablation."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scripts import script
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import identify
from hf_longctx.assets import asset, assets
from hf_longctx.config.config import load_shipped

pytestmark = pytest.mark.slow

# The heads of tiny-qwen3 attend to no copies (docs/heads.md), which methods that look for copies notice.
DOUBTS = {"tiny-qwen3": {"echo_induction", "retrieval_score"}}
OPTIONS = {
    "echo_induction": {},
    "two_needle": {},
    "retrieval_score": {},
    "duo_gates": {"steps": 100, "length": 1024, "gradient_checkpointing": False},
    "query_focused": {},
    "kvzip": {},
    "mean_rank": {},
}
TASK = "needle:variant=multi_key:needles=16:questions=16"
MEASURE = ["--tasks", TASK, "--tokens", "2048", "--contexts", "3", "--shares", "0.1", "0.3", "0.5", "0.7", "0.9"]


def test_there_are_three_models():
    assert assets() == ["tiny-llama", "tiny-mistral", "tiny-qwen3"]


@pytest.mark.parametrize("name", assets())
def test_methods_find_the_heads_that_ablation_finds(name, tmp_path):
    compare, maps, out = script("compare_heads"), tmp_path / "maps", tmp_path / "curves.jsonl"
    maps.mkdir()
    model = AutoModelForCausalLM.from_pretrained(asset(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(asset(name))
    sizes = load_shipped(name).stores.streaming
    load_shipped(name).to_yaml(maps / "ablation.yaml")
    sure = set()
    for method, options in OPTIONS.items():
        config = identify(model, tokenizer, method, sink=sizes.sink, recent=sizes.recent, **options)
        config.to_yaml(maps / f"{method}.yaml")
        sure |= {method} if config.heads.confidence == "measured" else set()
    assert set(OPTIONS) - sure == DOUBTS.get(name, set())
    asked = [str(asset(name)), "--maps", str(maps), "--out", str(out), "--random", "3", *MEASURE]
    compare.main(asked)
    measured = out.read_text()
    (cell,) = script("heads_tables").by_cell([out]).values()
    areas = {order: cell.area("right", order) for order in cell.orders()}
    chance = np.mean([area for order, area in areas.items() if order.startswith("random ")])
    assert cell.mean("right", "dense") > 0.85
    assert chance < areas["ablation"] - 0.1, "a control: the order matters"
    assert min(areas[method] for method in sure) > chance, areas
    assert max(areas[method] for method in OPTIONS) >= 0.95 * areas["ablation"], areas
    compare.main(asked)
    assert out.read_text() == measured, "what is there is not measured again"
