"""What records a forward as one fixed graph is told why a patched model is none."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import UnsupportedModeError, patch_model, unpatch_model

IDS = torch.arange(3, 43)[None]


class Logits(torch.nn.Module):
    """A model whose forward gives a tensor, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture
def model():
    torch.compiler.reset()
    model = tiny_model(layers=2)
    return patch_model(model, config_for(model))


def onnx(wrapped, folder):
    torch.onnx.export(wrapped, (IDS,), str(folder / "model.onnx"), dynamo=False)


WAYS = {
    "export": ("torch.export: a patched", lambda wrapped, folder: torch.export.export(wrapped, (IDS,))),
    "trace": ("torch.jit.trace: a patched", lambda wrapped, folder: torch.jit.trace(wrapped, (IDS,))),
    "onnx": ("torch.jit.trace: a patched", onnx),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_what_records_is_told_why(model, way, tmp_path):
    match, record = WAYS[way]
    before = model(IDS).logits
    with pytest.raises(UnsupportedModeError, match=f"{match}.*never one fixed graph.*unpatch_model"):
        record(Logits(model), tmp_path)
    assert torch.equal(model(IDS).logits, before)
    if way == "trace":
        dense = Logits(unpatch_model(model))
        torch.testing.assert_close(torch.jit.trace(dense, (IDS,))(IDS), dense(IDS))


def test_a_whole_graph_is_told_why(model):
    """What torch.compile does without fullgraph is in test_patch.py."""
    given = {"attention_mask": torch.ones_like(IDS)}
    with pytest.raises(RuntimeError, match="never one fixed graph.*one new token.*leave out fullgraph=True"):
        torch.compile(model, fullgraph=True, backend="eager")(IDS, **given)
    with pytest.raises(RuntimeError, match="or unpatch_model.model. first .torch.export"):
        torch.export.export(Logits(model), (IDS,), strict=True)
