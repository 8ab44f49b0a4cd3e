"""The flash kernel without flash-attn and without a GPU: stand-ins with the published signatures, computed slowly.

What the package itself computes is tested on a GPU alone: tests/gpu/test_flash_on_gpu.py.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.calls import causal, decode, dense, streaming

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import cpu, flash, reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.segments import Segment

CUDA = torch.device("cuda")
CASE = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, "needs_grad": False}
SINK, RECENT, SCALE = 3, 5, 0.3


def compute(q, k, v, scale, causal, window):
    """What flash-attn documents, in its layout; the logsumexp of a query that reads nothing is made useless."""
    assert q.shape[1] and k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    left, right = (-1 if edge is None else edge for edge in window)
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    j, right = torch.arange(k.shape[2]), 0 if causal else right
    visible = ((j <= i + right) | torch.tensor(right < 0)) & ((j >= i - left) | torch.tensor(left < 0))
    out, lse = reference.attention(q, k, v, visible, scale)
    return out.transpose(1, 2), lse.masked_fill(lse == -torch.inf, torch.inf)


def version_2(calls):
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append(("flash_attn", causal, window_size))
        out, lse = compute(q, k, v, softmax_scale, causal, window_size)
        return (out, lse, None) if return_attn_probs else out

    return flash_attn_func


def version_3(calls):
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        calls.append(("flash_attn_interface", causal, window_size))
        out, lse = compute(q, k, v, softmax_scale, causal, window_size)
        return (out, lse) if return_attn_probs else out

    return flash_attn_func


def version_4(calls):
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        calls.append(("flash_attn.cute", causal, window_size))
        out, lse = compute(q, k, v, softmax_scale, causal, window_size)
        return out, (lse if return_lse else None)

    return flash_attn_func


def version_4_early(calls):
    """Without a word for the logsumexp, which it always returns."""
    late = version_4(calls)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0):
        return late(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, return_lse=True)

    return flash_attn_func


STAND_INS = {
    "2": ("flash_attn", version_2, (8, 0)),
    "3": ("flash_attn_interface", version_3, (9, 0)),
    "4": ("flash_attn.cute", version_4, (10, 0)),
    "4 early": ("flash_attn.cute", version_4_early, (9, 0)),
}


@pytest.fixture
def install(monkeypatch):
    """Makes stand-ins the only installed versions, on a device of a capability; returns the list of their calls."""

    def put(*words, capability=None):
        calls = []
        for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, module, None)
        for word in words:
            name, make, own = STAND_INS[word]
            capability = capability or own
            if "." in name and sys.modules["flash_attn"] is None:
                monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
            module = ModuleType(name)
            module.flash_attn_func = make(calls)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability or (9, 0))
        flash._function.cache_clear()
        return calls

    yield put
    flash._function.cache_clear()


@pytest.fixture(params=STAND_INS)
def installed(request, install, monkeypatch):
    """(module, calls) of one version, which here computes on the CPU and in float64."""
    calls = install(request.param)
    monkeypatch.setattr(flash, "supports", lambda *case: None)
    return STAND_INS[request.param][0], calls


def random_qkv(q_len, kv_len, group=2, kv_heads=2, batch=2, dim=8):
    make = torch.Generator().manual_seed(q_len * 100 + kv_len)
    shapes = [(batch, kv_heads * group, q_len, dim)] + [(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (7, 7), (1, 9), (4, 9)])
def test_dense_prefill(installed, q_len, kv_len, group):
    module, calls = installed
    q, k, v = random_qkv(q_len, kv_len, group)
    want = dense(reference, q, k, v, SCALE)
    assert (dense(flash, q, k, v, SCALE) - want).abs().max() <= 1e-12
    assert [(name, causal) for name, causal, _ in calls] == [(module, True)]
    if kv_len > 1:
        assert (dense(flash, q, k, v, 2 * SCALE) - want).abs().max() > 1e-4, "a control"


@pytest.mark.parametrize(
    ("q_len", "total", "dropped"),
    [
        (1, 1, 0),
        (4, 4, 0),
        (8, 8, 0),
        (9, 9, 0),
        (30, 30, 0),
        (7, 11, 0),
        (1, 20, 0),
        (6, 30, 15),
        (11, 30, 9),
        (9, 20, 4),
    ],
)
@pytest.mark.parametrize("sink", [0, SINK])
def test_streaming_prefill(installed, q_len, total, dropped, sink):
    module, calls = installed
    q, k, v = random_qkv(q_len, total)
    sink, first = min(sink, total), min(sink, total) + dropped
    parts = [t[:, :, piece] for piece in (slice(0, sink), slice(first, total)) for t in (k, v)]
    got = streaming(flash, q, *parts, recent=RECENT, first=first, scale=SCALE)
    visible = reference.streaming_visible(q_len, total, sink, RECENT)
    assert (got - reference.attention(q, k, v, visible, SCALE)[0]).abs().max() <= 1e-12
    other = streaming(flash, q, *parts, recent=RECENT + 1, first=first, scale=SCALE)
    assert total <= sink + RECENT or (other - got).abs().max() > 1e-4, "a control"
    assert {name for name, _, _ in calls} == {module}
    assert total <= sink + RECENT or (module, True, (RECENT - 1, 0)) in calls


def test_segments_that_are_not_plain_are_those_of_cpu(installed):
    _, calls = installed
    q, k, v = random_qkv(3, 9)
    plain = Segment(k, v, 7)
    assert (causal(flash, q, [plain], SCALE) - causal(cpu, q, [plain], SCALE)).abs().max() < 1e-12
    assert len(calls) == 1
    biased = Segment(k, v, 7, bias=torch.randn(7, dtype=torch.float64))
    ragged = Segment(k, v, torch.tensor([7, 5]))
    for segments in ([plain, plain], [biased], [ragged]):
        assert torch.equal(causal(flash, q, segments, SCALE), causal(cpu, q, segments, SCALE))
    assert torch.equal(decode(flash, q[:, :, :1], [plain], SCALE), decode(cpu, q[:, :, :1], [plain], SCALE))
    assert len(calls) == 1


def test_the_version_for_the_device_is_taken(install):
    for capability, want in {(8, 6): "flash_attn", (9, 0): "flash_attn_interface", (10, 0): "flash_attn.cute"}.items():
        install("2", "3", "4", capability=capability)
        assert flash._version(CUDA, 128).module == want
    install("2", "4", capability=(10, 0))
    assert flash._version(CUDA, 256).module == "flash_attn", "wider than what version 4 takes"
    install("3", capability=(8, 0))
    assert "found flash_attn_interface, not for compute capability (8, 0)" in flash.supports(dispatch.Case(**CASE))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"head_dim": 264}, "with head_dim 264"),
        ({"head_dim": 12}, "with head_dim 12"),
        ({"needs_grad": True}, "no gradients"),
    ],
)
def test_what_it_does_not_compute(install, change, reason):
    install("2")
    assert flash.supports(dispatch.Case(**CASE)) is None
    assert dispatch.pick("flash", dispatch.Case(**CASE)) is flash
    assert reason in flash.supports(dispatch.Case(**{**CASE, **change}))


def test_it_is_never_required(install):
    install(capability=(9, 0))
    assert "none of the modules flash_attn_interface, flash_attn.cute, flash_attn can be imported" in flash.supports(
        dispatch.Case(**CASE)
    )
    with pytest.raises(UnsupportedModeError, match="flash: none of the modules.*auto or one of: .*cpu"):
        dispatch.pick("flash", dispatch.Case(**CASE))
    install("2", capability=(9, 0))
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is not flash, "not before it was timed on a device"
    with pytest.raises(UnsupportedModeError, match="it needs.*BlockList.*'flash'"):
        dispatch.require("flash", BlockList, "it")
    q, k, v = random_qkv(3, 9)
    with pytest.raises(UnsupportedModeError, match="needs a CUDA device, not cpu.*auto or cpu"):
        dense(flash, q, k, v, SCALE)


def test_importing_the_word_imports_no_flash_attn():
    top = ast.parse(Path(inspect.getfile(flash)).read_text("utf-8")).body
    imported = [alias.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    assert {"torch", "merge"} <= set(imported)
    assert not [name for name in imported if "flash" in name]
