"""The embedded model earns its place: it retrieves, its retrieval heads matter, and memory is saved."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxConfig, patch_model
from hf_longctx.assets import FOLDER, asset
from hf_longctx.commands._demo import run
from hf_longctx.tasks.tiny_language import VOCAB


@pytest.mark.slow
def test_the_demo_at_its_own_length():
    console = Console(record=True, width=120, quiet=True)
    dense, right, wrong = run(console=console)
    assert len(dense.hits) == 208
    assert dense.exact_match >= 0.95
    assert abs(right.exact_match - dense.exact_match) <= 0.02
    assert wrong.exact_match <= 0.10
    roles = ["".join(way.config.roles()) for way in (right, wrong)]
    assert roles[0].count("R") == roles[1].count("R") <= len(roles[0]) / 2
    assert mean(right.megabytes) < 0.40 * mean(dense.megabytes)
    assert mean(dense.megabytes) == 4 * 2 * 4 * 32 * 4 * 4087 / 1e6


def test_the_shipped_config_is_what_auto_finds():
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"))
    patch_model(model)
    assert model.config.longctx["model"]["ids"] == ["hf-longctx/tiny-llama"]
    assert LongCtxConfig.from_dict(model.config.longctx).roles() == ("SSSS", "RRRR", "SSSS", "SSSS")


def test_the_tokenizer_reads_the_language():
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-llama"))
    text = "note amber falcon is lemon river cobalt tiger ."
    ids = tokenizer(text)["input_ids"]
    assert [VOCAB[i] for i in ids] == text.split()
    assert tokenizer.decode(ids) == text
    assert tokenizer.padding_side == "left"


def test_the_weights_are_small_files():
    assert all(path.stat().st_size <= 12e6 for path in FOLDER.rglob("*") if path.is_file())
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"))
    assert model.dtype == torch.float32
