"""The Triton kernels without a GPU: computed by Triton's interpreter, compiled for two GPUs, and when they are picked.

Triton reads TRITON_INTERPRET when a kernel is defined, so both run in processes of their own. They fail where Triton is
not installed: the `dev` extra brings it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.calls import dense

import hf_longctx
from hf_longctx.kernels import _nvidia, cpu, triton
from hf_longctx.kernels import base as dispatch
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import All

TESTS = Path(__file__).parents[1]
CUDA = torch.device("cuda")
CASES = 51


def run_script(name: str, folder: Path, **environment: str) -> dict:
    """What a script of the tests prints as JSON."""
    package = str(Path(hf_longctx.__file__).parents[1])  # the one that is tested, wherever it was imported from
    environment |= {
        "TRITON_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((package, str(TESTS))),
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / name)],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_case_in_the_interpreter(tmp_path):
    said = run_script("triton_cases.py", tmp_path, TRITON_INTERPRET="1")
    assert len(said) == CASES
    failed = {name: failure for name, failure in said.items() if failure is not None}
    assert not failed, "\n".join(failed.values())


@pytest.mark.slow
def test_the_kernels_compile_fit_and_are_compiled_once(tmp_path):
    """For Ampere and Hopper, without either: shared memory, matrix instructions, and one variant for every length."""
    built = run_script("triton_builds.py", tmp_path)
    assert [(one["capability"], one["head_dim"]) for one in built] == [(80, 256), (90, 128)]
    for one in built:
        kernels = one["kernels"]
        names = {"sparse_kernel", "streaming_kernel", "decode_kernel", "merge_kernel", "packed_kernel"}
        assert set(kernels) == names
        assert {name: kernel["variants"] for name, kernel in kernels.items()} == dict.fromkeys(kernels, 1)
        assert all(kernel["shared"] <= one["limit"] for kernel in kernels.values())
        for name in ("sparse_kernel", "streaming_kernel"):
            assert kernels[name]["wgmma" if one["capability"] == 90 else "mma"]
        for name in ("sparse_kernel", "streaming_kernel", "decode_kernel"):
            assert kernels[name]["async_copies"], f"{name} does not load ahead"


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0, as far as `supports` asks."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_auto_picks_it_on_a_gpu_for_block_lists_alone(hopper, dtype, head_dim):
    case = {"device": CUDA, "dtype": dtype, "head_dim": head_dim, "needs_grad": False}
    assert dispatch.pick("triton", dispatch.Case(**case, reads=All)) is triton
    assert dispatch.pick("auto", dispatch.Case(**case, reads=BlockList)) is triton
    assert dispatch.pick("auto", dispatch.Case(**case, reads=All)) is not triton, "until it has been timed on a device"
    on_cpu = {**case, "device": torch.device("cpu")}
    assert dispatch.pick("auto", dispatch.Case(**on_cpu, reads=BlockList)) is not triton


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "not torch.float32"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 257}, "up to 256, not 257"),
        ({"needs_grad": True}, "no gradients"),
        ({"softcap": True}, "neither a softcap nor a bias"),
        ({"first_bias": True}, "neither a softcap nor a bias"),
        ({"kinds": frozenset({"pages"})}, "packed ones of one kind alone"),
        ({"kinds": frozenset({("packed", 4, 64)}), "reads": All, "one_query": True}, "head_dim 64 with queries of 128"),
        ({"kinds": frozenset({("packed", 4, 128)}), "reads": All}, "with one query over all of them alone"),
    ],
)
def test_what_it_does_not_compute(hopper, change, reason):
    case = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, "needs_grad": False}
    assert triton.supports(dispatch.Case(**case)) is None
    assert reason in triton.supports(dispatch.Case(**{**case, **change}))


def test_older_and_other_devices_are_refused_by_what_they_can_do(hopper, monkeypatch):
    case = (CUDA, torch.float16, 64, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability (8, 0), the device has (7, 5)" in triton.supports(dispatch.Case(*case))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in triton.supports(dispatch.Case(*case))


def test_without_triton_it_says_so_and_another_kernel_runs(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _nvidia._not_imported.cache_clear()
    try:
        assert "Triton cannot be imported" in triton.supports(dispatch.Case(CUDA, torch.bfloat16, 64))
        case = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, "needs_grad": False}
        assert dispatch.pick("auto", dispatch.Case(**case)) is not triton
    finally:
        _nvidia._not_imported.cache_clear()


def test_importing_the_word_imports_neither_triton_nor_the_kernels():
    top = ast.parse(Path(triton.__file__).read_text("utf-8")).body
    imported = [alias.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    assert {"torch", "cpu"} <= set(imported)
    assert not [name for name in imported if "triton" in name]


def test_dense_prefill_is_sdpa():
    q, k = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 90, 16)
    assert torch.equal(dense(triton, q, k, k, 0.3), dense(cpu, q, k, k, 0.3))
