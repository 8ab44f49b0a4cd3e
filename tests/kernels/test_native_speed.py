"""What ``auto`` takes where kernel cpu was measured to be faster than native; the table of the package."""

from __future__ import annotations

import platform
import re
from datetime import date

import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import patch_model, report
from hf_longctx.kernels import _native_build as build
from hf_longctx.kernels import _native_speed as speed
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import cpu, native
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import All, Averaged, Causal, Window
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

CPU = torch.device("cpu")
CASES = {
    "dense": {"reads": Causal},
    "window": {"reads": Window},
    "blocks": {"reads": BlockList},
    "few": {"reads": Causal, "few": True},
    "decode": {"reads": All, "one_query": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def case_of(function, dtype="float32", head_dim=64, **more):
    return dispatch.Case(CPU, DTYPES[dtype], head_dim, **CASES[function] | more)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """These tests fail where there is no compiler."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    assert native.supports(case_of("dense")) is None


@pytest.fixture
def slower(monkeypatch):
    """Native is slower in one function and dtype, on this kind of machine or another; faster in the other functions."""

    def make(function, dtype, arch=None, dims=(64,)):
        rows = {(arch or native.arch(), name, word): {64: 2.0} for name in CASES for word in DTYPES}
        rows[arch or native.arch(), function, dtype] = dict.fromkeys(dims, 0.97)
        monkeypatch.setattr(speed, "table", lambda: rows)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", CASES)
def test_auto_takes_cpu_where_it_is_faster_and_native_for_the_rest(function, dtype, slower):
    slower(function, dtype)
    picked = {(name, word): dispatch.pick("auto", case_of(name, word)) for name in CASES for word in DTYPES}
    assert [key for key, kernel in picked.items() if kernel is cpu] == [(function, dtype)]
    assert set(picked.values()) == {cpu, native}
    assert dispatch.pick("native", case_of(function, dtype)) is native, "a kernel that is named runs"


@pytest.mark.parametrize("more", [{"softcap": True}, {"first_bias": True}, {"kinds": frozenset({("int", 8, 64)})}])
def test_what_was_not_measured_goes_by_the_preference(more, slower, monkeypatch):
    slower("decode", "float32")
    assert native.preference(case_of("decode")) < cpu.PREFERENCE
    assert native.preference(case_of("decode", **more)) == native.PREFERENCE
    for reads, one in ((All, False), (Averaged, False), (BlockList, True), (Window, True)):
        assert speed.function_of(dispatch.Case(CPU, torch.float32, 64, reads=reads, one_query=one)) is None


def test_few_queries_are_those_that_the_library_decodes():
    source = (build.SOURCES / "decode.h").read_text("utf-8")
    assert int(re.search(r"FEW_TOKENS = (\d+);", source)[1]) == dispatch.FEW
    k = torch.zeros(1, 1, 60, 16)
    found = {n: dispatch.case_of(k[:, :, :n], [Segment(k, k, 60)], Causal(), Scores(1.0)) for n in (1, 2, 24, 25)}
    assert {n: speed.function_of(case) for n, case in found.items()} == {1: "decode", 2: "few", 24: "few", 25: "dense"}
    assert all(speed.function_of(case_of(name, few=True)) is None for name in ("window", "blocks"))


def test_an_unknown_machine_goes_by_the_preference(slower):
    slower("dense", "float32", arch="vax")
    assert all(dispatch.pick("auto", case_of(name)) is native for name in CASES)


def test_the_nearest_head_dim_counts(monkeypatch):
    rows = {(native.arch(), "dense", "float32"): {64: 0.5, 128: 1.5}}
    monkeypatch.setattr(speed, "table", lambda: rows)
    found = {dim: dispatch.pick("auto", case_of("dense", head_dim=dim)).NAME for dim in (16, 64, 96, 112, 256)}
    assert found == {16: "cpu", 64: "cpu", 96: "cpu", 112: "native", 256: "native"}


def test_where_cpu_does_not_compute_the_case_the_slower_native_does(slower, monkeypatch):
    slower("dense", "float32")
    monkeypatch.setattr(cpu, "supports", lambda case: "not today")
    assert dispatch.pick("auto", case_of("dense")) is native


def test_another_machine_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(native, "preference", lambda case: pytest.fail("of a case that native does not compute"))
    assert dispatch.pick("auto", dispatch.Case(CPU, torch.float64, 64)) is cpu
    assert dispatch.pick("auto", dispatch.Case(CPU, torch.float32, 64, needs_grad=True)) is cpu


def test_the_report_names_what_ran_and_the_table_is_asked_once_per_forward_and_case(slower, monkeypatch):
    model, ids = tiny_model(head_dim=16, dtype=torch.bfloat16), torch.randint(3, 97, (1, 150))
    assert model.config.num_hidden_layers > 1
    asked, faster = [], speed.faster
    monkeypatch.setattr(speed, "faster", lambda arch, case: asked.append(speed.function_of(case)) or faster(arch, case))
    named = {}
    for function in ("dense", "window"):
        slower(function, "bfloat16")
        patch_model(model, config_for(model))
        with torch.no_grad():
            model(ids, use_cache=True)
        named[function] = report(model).kernels
    assert named == {"dense": ("cpu", "native"), "window": ("cpu", "native")}
    assert sorted(asked) == ["dense", "dense", "window", "window"], "not once per layer"
    patch_model(model, config_for(model), kernel="native")
    with torch.no_grad():
        model(ids, use_cache=True)
    assert report(model).kernels == ("native",)


def test_decoding_by_cpu_has_no_step_of_native(slower):
    assert dispatch.new_step("auto", CPU, torch.float32, 64, ()) is not None
    slower("decode", "float32")
    assert dispatch.new_step("auto", CPU, torch.float32, 64, ()) is None
    assert dispatch.new_step("native", CPU, torch.float32, 64, ()) is not None


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
def test_the_kind_of_machine_is_the_librarys_and_amx_is_torchs(monkeypatch):
    plain = native.arch().removesuffix(speed.AMX)
    assert plain in speed.ARCHS
    try:
        for amx in (False, True):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)  # noqa: B023
            speed._torch_has_amx.cache_clear()
            assert native.arch() == plain + amx * "+amx"
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
        speed._torch_has_amx.cache_clear()
        monkeypatch.setenv(build.ARCH, "avx2")
        native._load.cache_clear()
        assert native.arch() == "avx2"
    finally:
        native._load.cache_clear()
        speed._torch_has_amx.cache_clear()


def test_the_rows_of_the_package_are_whole():
    rows = speed.read(speed.FILE)
    keys = [(row["arch"], row["function"], row["dtype"], row["head_dim"]) for row in rows]
    assert len(set(keys)) == len(keys)
    arches = {row["arch"] for row in rows}
    assert arches >= {"avx2", "avx512-bf16"}
    assert {arch.removesuffix(speed.AMX) for arch in arches} <= set(speed.ARCHS)
    for arch in arches:
        own = {key[1:] for key in keys if key[0] == arch}
        assert own >= {(name, word, dim) for name in speed.FUNCTIONS for word in DTYPES for dim in (64, 128)}
    for row in rows:
        assert set(row) == {"arch", "function", "dtype", "head_dim", "faster", "by_tokens", "measured"}
        assert 0.05 < row["faster"] == min(row["by_tokens"].values()) < 100
        measured = row["measured"]
        assert measured["cpu"] and measured["torch"] and measured["hf_longctx"] and measured["threads"] >= 1
        assert date.fromisoformat(measured["date"]) >= date(2026, 11, 30)
        torch_cpu = measured["torch_cpu"]
        assert torch_cpu == "AVX2" if row["arch"] == "avx2" else torch_cpu.startswith("AVX512"), "torch's, of this CPU"


def test_the_table_holds_the_rows(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"rows": [{"arch": "a", "function": "dense", "dtype": "float32", "head_dim": 64, "faster": 0.5}]}')
    monkeypatch.undo()
    monkeypatch.setattr(speed, "FILE", path)
    speed.table.cache_clear()
    try:
        assert speed.table() == {("a", "dense", "float32"): {64: 0.5}}
        assert speed.faster("a", case_of("dense")) == 0.5 and speed.faster("b", case_of("dense")) is None
    finally:
        speed.table.cache_clear()
