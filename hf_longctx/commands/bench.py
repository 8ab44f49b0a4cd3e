"""The commands ``hf-longctx bench decode | prefill | e2e | real | batching | crossover | ...``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import typer

from ..assets import embedded
from ..bench.environment import Busy, retune
from ..bench.settings import Settings, default_layers
from ..io.console import console
from ..io.progress import Progress
from ..planning.sizes import DTYPES, parse_tokens
from ._bench_batching import command as batching
from ._bench_memory import command as memory
from ._bench_options import Crossover, Decode, Gpu, Kernels, Measured, Prefill, Real, Whole, takes
from ._bench_serve import command as serve
from ._options import (
    JSON,
    PNG,
    check_output,
    check_picture,
    device_of,
    load_model,
    short_names,
    write_json,
    write_png,
)

app = typer.Typer(no_args_is_help=True, help="Speed and memory, stock against patched, on this machine.")

app.command("memory", **short_names(chunk="prefill-chunk-size"))(memory)
app.command("batching")(batching)
app.command("serve")(serve)


@app.command("decode")
@takes(Decode)
def decode(options: Decode) -> None:
    """Attention and cache update of one decoded token, per layer, over caches filled with random K/V."""
    _bench("decode", options)


@app.command("prefill")
@takes(Prefill)
def prefill(options: Prefill) -> None:
    """Attention over a prompt, of streaming heads and by block lists, against dense attention; choosing the blocks."""
    _bench("prefill", options)


@app.command("e2e")
@takes(Whole)
def e2e(options: Whole) -> None:
    """A whole model of random weights: prompt to logits and one decoded token, stock against patched."""
    _bench("e2e", options)


@app.command("real")
@takes(Real)
def real(options: Real) -> None:
    """A whole checkpoint: reading a prompt and decoding, stock against patched, and beside llama.cpp."""
    case = ("model", "config", "batch", "threads", "kernel", "llama_cpp")
    _bench("real", options, case, load=_loads(options.model))


@app.command("crossover")
@takes(Crossover)
def crossover(options: Crossover) -> None:
    """The length from which sparse prefill, or a selection (--decode), wins on this machine, and its override."""
    shape = [name for name in ("heads", "kv_heads", "head_dim") if getattr(options, name) is not None]
    if options.config is not None and shape:
        flag = f"--{shape[0].replace('_', '-')}"
        raise typer.BadParameter("the shape is the config's; give one or the other", param_hint=flag)
    if options.decode is None:
        _bench("crossover", options, ("config", "pattern", "table", "kernel"), ("decode",))
        return
    if other := [name for name in ("config", "pattern", "table") if getattr(options, name) is not None]:
        raise typer.BadParameter("is of prompts; with --decode the shape is given", param_hint=f"--{other[0]}")
    _bench("crossover_decode", options, ("decode",), ("config", "pattern", "table"))


@app.command("kernels")
@takes(Kernels)
def kernels(options: Kernels) -> None:
    """Kernel native against torch, by function, dtype and head_dim: what auto goes by on this kind of machine."""
    from ..bench.kernels import rows_of, write_rows

    check_output(options.rows, JSON, "--rows")
    others = rows_of(options.rows)
    data = _bench("kernels", options, ("head_dim",), ("rows",))
    write_rows(options.rows, data["rows"], others)


@app.command("gpu")
@takes(Gpu)
def gpu(options: Gpu) -> None:
    """The kernels on a CUDA GPU: prompts and decoding, of one layer, against the best dense attention there."""
    check_output(options.json, JSON, "--json")
    values = _parsed(options)
    del values["json"]

    from ..bench.gpu import bench
    from ..bench.gpu_settings import GpuSettings
    from ..bench.gpu_show import as_json, show

    settings = GpuSettings(**values)
    with _progress("gpu", settings, (*settings.tokens, *settings.decode_tokens)) as bar:
        data = as_json(settings, *bench(settings, bar.advance))
    write_json(options.json, data)
    show(console(), data)


def _loads(model: str) -> Callable[[str], tuple[Any, Any]]:
    """What loads the checkpoint in a dtype, and its tokenizer or None."""
    return lambda word: load_model(embedded(model), DTYPES[word], device_of("cpu"), needs_tokenizer=False)


def _bench(
    benchmark: str, options: Measured, case: tuple[str, ...] = (), own: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    """Run one benchmark, print its table, write JSON and picture; what the JSON holds.

    Args:
        case: names of the options that are arguments of the benchmark's ``case_of`` and no field of ``Settings``.
        own: names of the options that the command itself reads.
        more: further arguments of ``case_of``.
    """
    settings = _settings(benchmark, options, (*case, *own))
    check_output(options.json, JSON, "--json")
    check_picture(options.png, PNG, "--png")
    if options.tuned_malloc:
        retune()
    import torch  # here, so that --help does not wait for it

    from ..bench.show import as_json, show

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    module = importlib.import_module(f"hf_longctx.bench.{benchmark}")
    values = _parsed(options)
    measured = module.case_of(settings, **{name: values[name] for name in case}, **more) if case else settings
    busy = Busy()
    with _progress(benchmark, settings, getattr(measured, "lengths", settings.tokens)) as bar:
        results = module.run(measured, bar.advance)
    if case:
        data = as_json(benchmark, measured.settings, results, busy.others(), module.facts(measured, results))
    else:
        data = as_json(benchmark, settings, results, busy.others())
    write_json(options.json, data)  # before the table, which a closed pipe may cut off
    write_png(options.png, data)
    show(console(), data)
    return data


def _progress(benchmark: str, settings: Settings, lengths: tuple[int, ...]) -> Progress:
    """Of all rounds of all lengths; a round of more tokens weighs more."""
    each = len(settings.dtypes) * settings.rounds
    return Progress(f"bench {benchmark}", each * len(lengths), "rounds", weight=each * sum(lengths))


def _settings(benchmark: str, options: Measured, left_out: tuple[str, ...]) -> Settings:
    """The settings that the options mean; an option that is None has its default."""
    values = _parsed(options)
    values["dtypes"] = values.pop("dtype")
    for name in (*left_out, "json", "png", "tuned_malloc"):
        del values[name]
    if values.get("layers", 0) is None:
        values["layers"] = default_layers(benchmark, values["tokens"])
    return Settings(**{name: value for name, value in values.items() if value is not None})


def _parsed(options: Measured | Gpu) -> dict[str, Any]:
    """The options by name; those that are lists with commas, as tuples."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for name, parse in PARSERS.items():
        if isinstance(values.get(name), str):
            values[name] = parse(values[name], f"--{name.replace('_', '-')}")
    return values


def _words(text: str, option: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _lengths(text: str, option: str) -> tuple[int, ...]:
    return tuple(parse_tokens(part, option) for part in _words(text, option))


def _percents(text: str, option: str) -> tuple[int, ...]:
    return _whole(text, option, "percents such as 10,25,50")


def _counts(text: str, option: str) -> tuple[int, ...]:
    return _whole(text, option, "numbers such as 1,2")


def _whole(text: str, option: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _words(text, option))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of {what}", param_hint=option) from None


PARSERS = {
    "dtype": _words,
    "patterns": _words,
    "select": _words,
    "kernels": _words,
    "tokens": _lengths,
    "decode_tokens": _lengths,
    "densities": _percents,
    "retrieval": _percents,
    "batch": _counts,
    "threads": _counts,
    "head_dim": _counts,
}
