"""The table of ``bench gpu``, and the JSON that holds everything."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from ..io.console import tables
from .environment import environment
from .gpu_settings import GpuSettings
from .show import _ms

PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")
HEADER = ("case", "tokens", "", "ms", "vs best dense", "of ideal", "GB/s", "of bandwidth")


def as_json(settings: GpuSettings, results: list[dict], gb_per_s: float) -> dict:
    """Versions, settings, every figure and raw time; ``gb_per_s`` is the device's bandwidth."""
    return {
        "benchmark": "gpu",
        "environment": {**environment(), **_device(), "gb_per_s": gb_per_s},
        "settings": settings.as_dict(),
        "results": results,
    }


def _device() -> dict:
    """The GPU and what was installed for it; nothing of what is not there."""
    found = {}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found = {"gpu": about.name, "gpu_gb": about.total_memory / 1e9, "capability": [about.major, about.minor]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "cuda": torch.version.cuda}


def show(console: Console, data: dict) -> None:
    """Print `as_json`: a table, what it ran on, and what could not be measured."""
    e = data["environment"]
    s = data["settings"]
    title = "bench gpu: attention of one layer, time on the device"
    rows = []
    for result in data["results"]:
        rows += [*[None] * bool(rows), *_lines(result, e["gb_per_s"])]
    for table in tables(title, HEADER, rows, console.width, left=("case", ""), key=3):
        console.print(table)
    console.print(
        f"{s['heads']} query heads, {s['kv_heads']} KV heads, head_dim {s['head_dim']}, {', '.join(s['dtypes'])}; "
        f"streaming heads keep sink {s['sink']} + recent {s['recent']}; {s['rounds']} rounds, in turns; median (10th "
        "to 90th percentile). Best dense = the fastest of SDPA's flash and cuDNN kernels and flash-attn. Of ideal = vs "
        "best dense, times the share of the causal keys (prefill) or of the bytes (decode) that is read, in "
        f"parentheses. Of bandwidth: of {e['gb_per_s']:.0f} GB/s, a sum or a copy of a large buffer in the same run. "
        "blocks N% = random block lists; choosing them is not timed."
    )
    installed = ", ".join(f"{name} {e[name]}" for name in PACKAGES if name in e)
    console.print(
        f"{e.get('gpu', 'no GPU')}, CUDA {e['cuda']}, {installed}; torch {e['torch']}, transformers "
        f"{e['transformers']}, Python {e['python']}, hf_longctx {e['hf_longctx']}."
    )
    reasons = {(what, why) for result in data["results"] for what, why in result["not_measured"].items()}
    for what, why in sorted(reasons):
        console.print(f"Not measured: {what}: {why}", style="yellow", markup=False)


def _lines(result: dict, gb_per_s: float) -> Iterator[list[str]]:
    best = result["columns"][result["best_dense"]]["ms"]["median_ms"]
    for name, column in result["columns"].items():
        faster = best / column["ms"]["median_ms"]
        rate = column.get("gb_per_s")
        ideal = "" if column["density"] == 1 else f"{column['density'] * faster:.0%} ({column['density']:.1%})"
        speed = ["", ""] if rate is None else [f"{rate:.0f}", f"{rate / gb_per_s:.0%}"]
        yield [result["case"], str(result["tokens"]), name, _ms(column["ms"]), f"{faster:.2f}x", ideal, *speed]
