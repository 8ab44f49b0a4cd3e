"""Whole models on the native kernel: the tokens of the dense mask, alone, padded, copied and compiled.

Float32 models of head_dim 16; the exact tests of the library run in float64, which the native kernel does not take.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.tiny import FAMILIES, DenseMask, config_for, left_padded, tiny_model

from hf_longctx import patch_model, report
from hf_longctx.kernels import native

PROMPT = 150


pytestmark = pytest.mark.usefixtures("native_on")


def tokens_of(model, ids, mask=None, new=12):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_dense_mask(family):
    model, ids = tiny_model(family, head_dim=16), torch.randint(3, 97, (1, PROMPT))
    config = config_for(model)
    with DenseMask(model, config):
        want = tokens_of(model, ids)
    with DenseMask(model, config_for(model, recent=2)):
        assert not torch.equal(tokens_of(model, ids), want), "a control"
    patch_model(model, config)
    assert torch.equal(tokens_of(model, ids), want)
    assert report(model).kernels == ("native",)


def test_a_padded_batch_gives_the_tokens_of_its_rows():
    model = tiny_model(head_dim=16)
    patch_model(model, config_for(model))
    ids, mask = left_padded([PROMPT, 70, 21])
    together = tokens_of(model, ids, mask)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(tokens_of(model, alone)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_the_cpu_kernel_gives_the_same_answer(dtype, monkeypatch):
    model, ids = tiny_model(head_dim=16, dtype=dtype), torch.randint(3, 97, (1, PROMPT))
    answers = {}
    for switch, kernel in (("1", "native"), ("0", "cpu")):
        monkeypatch.setenv(native.SWITCH, switch)
        native._load.cache_clear()
        patch_model(model, config_for(model))
        with torch.no_grad():
            answers[kernel] = model(ids, use_cache=False).logits
        assert report(model).kernels == (kernel,)
    logits, other = answers.values()
    assert not torch.equal(logits, other), "a control: another kernel"
    assert (logits - other).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05) * other.abs().max()


def test_copies_and_pickles_go_on_after_the_kernel_ran():
    model, ids = tiny_model(head_dim=16), torch.randint(3, 97, (1, PROMPT))
    patch_model(model, config_for(model))
    want = tokens_of(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tokens_of(other, ids), want)
        assert report(other).kernels == ("native",)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_tokens_and_names_its_kernel():
    """A prompt is traced, which the native kernel cannot be: the cpu kernel reads it, decoded tokens run native."""
    model, ids = tiny_model(head_dim=16, layers=1), torch.randint(3, 97, (1, PROMPT))
    patch_model(model, config_for(model))
    want = tokens_of(model, ids, new=3)
    assert report(model).kernels == ("native",)
    patch_model(model, config_for(model))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        step = compiled(ids)
        got = [step.logits[:, -1:].argmax(-1)]
        for _ in range(2):
            step = compiled(got[-1], past_key_values=step.past_key_values)
            got.append(step.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(got, 1), want)
    assert report(model).kernels == ("cpu", "native")
    assert report(model).notes == ("torch.compile: ran with graph breaks",)
