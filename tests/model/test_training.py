"""Gradients and training: the same mask on plain tensors, no cache injected, only differentiable kernels."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import FAMILIES, DenseMask, config_for, left_padded, tiny_model

from hf_longctx import patch_model, patched
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.rows import Rows


def gradients(model, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    out = model(**kwargs)
    loss = out.loss if out.loss is not None else out.logits.square().mean()
    loss.backward()
    return out, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("way", ["train", "no cache", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_dense_mask(family, way):
    model = tiny_model(family, torch.float64)
    config = config_for(model, "mixed", 3, 9)
    ids, mask = left_padded([50, 22])
    asked = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model.train(way == "train")
    with DenseMask(model, config):
        want, right = gradients(model, **asked, use_cache=False)
    patch_model(model, config)
    out, got = gradients(model, **asked, **({"use_cache": False} if way == "no cache" else {}))
    torch.testing.assert_close(out.loss, want.loss, rtol=0, atol=1e-6)
    for ours, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert max(g.abs().max() for g in right) > 1e-4
    if way != "eval":
        assert type(out.past_key_values).__name__ != "LongCtxCache"
    else:
        assert type(out.past_key_values).__name__ == "LongCtxCache"
        assert not any(t.requires_grad for layer in out.past_key_values.layers for t in layer.tensors())


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_gives_stock_loss_and_gradients(family):
    model = tiny_model(family, torch.float64)
    ids, mask = (t.flip(1) for t in left_padded([40, 17]))
    asked = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    want, right = gradients(model, **asked)
    with patched(model, config_for(model, "retrieval")):
        out, got = gradients(model, **asked)
    torch.testing.assert_close(out.loss, want.loss, rtol=0, atol=1e-6)
    for ours, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with patched(model, config_for(model, "mixed")):
        together = model(**asked).logits
        alone = model(ids[1:, :17], use_cache=False).logits
    torch.testing.assert_close(together[1:, :17], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = tiny_model("llama", torch.float64).train()
    patch_model(model, config_for(model, "mixed"))
    ids, mask = left_padded([50, 22])
    asked = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    _, want = gradients(model, **asked)
    # The method was renamed in Transformers 5.23; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    out, got = gradients(model, **asked)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_gradcheck_through_a_patched_layer():
    model = tiny_model("llama", torch.float64, layers=1, kv_heads=2)
    patch_model(model, config_for(model, ["RS"], 2, 5))
    layer = model.base_model.layers[0].self_attn

    def attention(states):
        cos, sin = model.base_model.rotary_emb(states, torch.arange(12)[None])
        return layer(states, (cos.double(), sin.double()), None, longctx_forward=Forward(Rows(1, 0, 12)))[0]

    states = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, states)
