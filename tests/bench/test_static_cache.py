"""Stock Transformers with a ``StaticCache`` as a column: what it reads, that it is checked, or why it cannot run."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from hf_longctx import LongCtxError
from hf_longctx.bench import columns, decode, e2e, show, static_cache
from hf_longctx.bench.measure import paired_ratio
from hf_longctx.bench.settings import Settings

TINY = Settings((65,), ("fp32",), layers=2, heads=8, kv_heads=4, head_dim=16, sink=4, recent=16, rounds=2)
STATIC = "stock static"


def printed(benchmark: str, results: list[dict]) -> str:
    console = Console(width=250, file=io.StringIO())
    show.show(console, show.as_json(benchmark, TINY, results))
    return console.file.getvalue()


def test_its_mask_is_the_one_that_transformers_makes(monkeypatch):
    model = columns.make_model(TINY, torch.float32, "cpu")
    masks, ids = [], torch.arange(66)[None]
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    cache = static_cache.new_cache(model, 70)
    with torch.no_grad():
        model(ids[:, :65], past_key_values=cache)
        masks.clear()
        model(ids[:, 65:], past_key_values=cache)
    column = static_cache.StaticColumn.of_capacity(TINY, torch.float32, 70)
    for count in (65, 1):
        for layer in range(2):
            kept = column.update(layer, *(columns.random_heads(4, count, TINY, torch.float32) for _ in "kv"))
    assert column.mask.sum() == 66 and kept[0].shape == (1, 4, 70, 16)
    assert len(masks) == 2 and all(torch.equal(mask, column.mask) for mask in masks)
    column.forget()
    column.update(0, *(columns.random_heads(4, 3, TINY, torch.float32) for _ in "kv"))
    assert column.mask.sum() == 3


@pytest.mark.parametrize("run", [decode.run, e2e.run])
def test_a_static_cache_that_answers_otherwise_is_caught_before_anything_is_timed(run, monkeypatch):
    init = static_cache.StaticCache.update

    def wrong(cache, k, v, layer_idx, *args, **kwargs):
        return init(cache, k, -v, layer_idx, *args, **kwargs)

    monkeypatch.setattr(static_cache.StaticCache, "update", wrong)
    for module in (decode, e2e):
        monkeypatch.setattr(module, "turns", lambda *args: pytest.fail("timed columns that differ"))
    with pytest.raises(LongCtxError, match="stock static,? differs"):
        run(TINY)


@pytest.mark.parametrize("run", [decode.run, e2e.run])
def test_where_it_does_not_run_the_others_do_and_it_is_said_why(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("no such argument\nsecond line")

    monkeypatch.setattr(static_cache, "StaticCache", refuse)
    if run is decode.run:
        with pytest.raises(TypeError):
            static_cache.StaticColumn.of_capacity(TINY, torch.float32, 2)
    (result,) = run(TINY)
    assert result["not_measured"] == {STATIC: "TypeError: no such argument"} and STATIC not in result["columns"]
    benchmark = "decode" if run is decode.run else "e2e"
    said = printed(benchmark, [result])
    assert f"Not measured: {STATIC}, fp32 at 65: TypeError: no such argument\n" in said
    assert "vs static" not in said and "of static" not in said


@pytest.mark.parametrize("run", [decode.run, e2e.run])
def test_it_can_be_left_out(run):
    (result,) = run(replace(TINY, static=False))
    assert STATIC not in result["columns"] and result["not_measured"] == {}


def test_ratios_against_it_stand_beside_those_against_stock():
    (result,) = decode.run(TINY)
    ms = {name: column["ms_per_layer"]["median_ms"] for name, column in result["columns"].items()}
    said = printed("decode", [result])
    assert "vs static" in said and "StaticCache of just the capacity needed" in said
    row = next(line for line in said.splitlines() if "half streaming" in line)
    cells = [cell.strip() for cell in row.split("│")]
    bases = ("stock", STATIC, "all retrieval")
    assert cells[4:7] == [f"{ms[base] / ms['half streaming']:.2f}x" for base in bases]
    (result,) = e2e.run(TINY)
    half, static = (result["columns"][name] for name in ("half streaming", STATIC))
    for part in ("prefill", "decode", "total"):
        mine, other = (columns_.get(f"{part}_ms")["raw_ms"] for columns_ in (half, static))
        samples = [e2e.Samples(times) for times in (mine, other)]
        assert half[f"{part}_of_static"] == paired_ratio(*samples)
    said = printed("e2e", [result])
    assert f"{half['decode_of_static']:.1%}" in said and f"{half['total_of_static']:.1%}" in said


def test_stock_stays_a_dynamic_cache(monkeypatch):
    seen, turn = {}, e2e.turn

    def noted(settings, model, how, *rest, **more):
        def hook(_, args, kwargs, out):
            seen.setdefault("static" if how.static else "patched" if how.patch else "stock", set()).add(
                type(out.past_key_values)
            )

        handle = model.register_forward_hook(hook, with_kwargs=True)
        try:
            return turn(settings, model, how, *rest, **more)
        finally:
            handle.remove()

    monkeypatch.setattr(e2e, "turn", noted)
    e2e.run(TINY)
    assert seen["stock"] == {DynamicCache} and seen["static"] == {static_cache.StaticCache}
    assert {one.__name__ for one in seen["patched"]} == {"LongCtxCache"}
