"""examples/laptop.py: the table of light weights, what did not run, and what is compiled."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.pages import ROOT
from helpers.scripts import script
from helpers.tiny import tiny_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

MODEL = "hf-longctx/tiny-llama"
QUICK = ["--tokens", "160", "--steps", "2", "--rounds", "2", "--quality", "64", "--text", str(ROOT / "README.md")]

laptop = script("laptop")


def run(capsys, *given: str) -> tuple[dict[str, list[str]], str]:
    """(cells by the name of their recipe, everything printed)."""
    laptop.main([MODEL, *QUICK, *given])
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if line[:1] == "│"]
    return {name: cells for name, *cells in lines}, said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_recipe_runs_and_is_compared_with_fp32(capsys):
    with torch.compiler.set_stance("force_eager"):
        found, said = run(capsys, "--compile", "int8")
    assert [*found] == ["fp32", "bf16", "int8", "w8a8", "int4", "int8 compiled"]
    kl = {name: float(cells[4]) for name, cells in found.items()}
    assert kl["fp32"] == 0 < kl["bf16"] < kl["int8"] < kl["int4"] and kl["int8"] == kl["int8 compiled"]
    assert all(float(ms) > 0 for cells in found.values() for ms in cells[2:4])
    assert max(map(len, said.splitlines())) <= 80
    assert "int8 compiled: the first tokens came after" in said and "2 rounds of 2 tokens" in said


def test_what_does_not_run_is_named_and_the_rest_goes_on(capsys, monkeypatch):
    def broken(model):
        raise RuntimeError("no kernel\nand much more")

    monkeypatch.setitem(laptop.RECIPES, "int8", dataclasses.replace(laptop.RECIPES["int8"], quantise=broken))
    found, said = run(capsys, "--recipes", "int8", "bf16", "--config", "stock")
    assert found["int8"][0] == "failed" and "int8: RuntimeError: no kernel" in said and "and much more" not in said
    assert float(found["bf16"][4]) > 0 and "config stock" in said


def test_bytes_are_those_of_what_is_there():
    model = tiny_model(group=4)
    numbers = {one.data_ptr(): one.numel() for one in model.parameters()}
    whole = laptop.weight_bytes(model)
    assert whole == 4 * sum(numbers.values())
    tied = tiny_model(group=4, tie_word_embeddings=True)
    assert laptop.weight_bytes(tied) == whole - tied.lm_head.weight.nbytes
    linear = sum(one.weight.numel() for one in model.modules() if laptop.is_linear(one))
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    assert whole - 3 * linear < laptop.weight_bytes(model) < whole - 2.5 * linear, "a byte each, and the steps"


def test_stock_is_not_compiled(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--config", "stock", "--compile", "bf16")
    assert "leave out --config stock" in capsys.readouterr().err


def test_a_token_is_compiled_in_one_graph(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **more: asked.append(more) or function)
    model = tiny_model()
    assert laptop.compiled_token(model) == model.forward
    assert asked == [{"fullgraph": True, "options": {"freezing": True}}]
