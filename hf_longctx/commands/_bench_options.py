"""The options of the benchmarks: a dataclass of each, whose fields are the options of its command.

In the help of a command the fields of its own dataclass come first, then those of the dataclass below it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ._options import Json, Model, Png, Recent, Sink

Options = TypeVar("Options")

Prompts = Annotated[str, typer.Option(help="Lengths of the prompt: 8192,32k (k: 1024).")]
Caches = Annotated[str, typer.Option(help="Lengths of the filled caches: 8192,32k (k: 1024).")]
Dtypes = Annotated[str, typer.Option("--dtype", help="fp32, bf16, or both.")]
Densities = Annotated[str, typer.Option(help="Percents of the blocks that block lists read.")]
Rounds = Annotated[int, typer.Option(help="How often every column takes its turn.")]
HeadDim = Annotated[int, typer.Option(help="Dimension of a head.")]
Static = Annotated[bool, typer.Option("--static/--no-static", help="Also stock with Transformers' StaticCache.")]
ConfigsKernel = Annotated[str | None, typer.Option(help="auto, cpu, native, ...", show_default="the config's")]


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function: its options are the fields of the dataclass, of which it is given an object."""
    hints = get_type_hints(options, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    parameters = []
    for name in dict.fromkeys(name for cls in options.__mro__ for name in inspect.get_annotations(cls)):
        kind = inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if defaults[name] is dataclasses.MISSING else defaults[name]
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=hints[name]))

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(options(**values))

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = hints
        return command

    return decorate


@dataclass(frozen=True)
class Measured:
    """Options of every benchmark that runs on the processor."""

    tokens: Prompts = ""
    dtype: Dtypes = "fp32,bf16"
    rounds: Rounds = 5
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="torch's own choice")] = None
    seed: Annotated[int, typer.Option(help="Random seed of the tensors, and of which heads are streaming.")] = 0
    json: Json = None
    png: Png = None
    tuned_malloc: Annotated[
        bool, typer.Option("--tuned-malloc", help="Run again with malloc variables that help stock's torch.cat.")
    ] = False


@dataclass(frozen=True)
class Shaped(Measured):
    """And of those that are told the shape of the layers."""

    layers: Annotated[int, typer.Option(help="Layers. The default shape is that of Llama-3.2-1B.")] = 4
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32
    kv_heads: Annotated[int, typer.Option(help="KV heads; in half streaming, half of them stream.")] = 8
    head_dim: HeadDim = 64
    sink: Sink = 64
    recent: Recent = 256
    kernel: Annotated[str, typer.Option(help="Of the patched columns: auto, stock, cpu, native, ...")] = "auto"


@dataclass(frozen=True)
class Decode(Shaped):
    tokens: Caches = "8192,32768"
    rounds: Rounds = 7
    steps: Annotated[int, typer.Option(help="Tokens decoded per column and round.")] = 3
    static: Static = True
    select: Annotated[
        str, typer.Option(help="Selections, two columns each (all retrieval, half streaming): WORD:field=value:...,...")
    ] = ""


@dataclass(frozen=True)
class Prefill(Shaped):
    tokens: Prompts = "8192,32768"
    densities: Densities = "10,20,30"
    patterns: Annotated[
        str, typer.Option(help="Patterns whose choosing is timed, each WORD or WORD:field=value:field=value.")
    ] = "vertical_slash,block_topk"
    rounds: Rounds = 3


@dataclass(frozen=True)
class Whole(Shaped):
    tokens: Prompts = "512,1024"
    layers: Annotated[
        int | None, typer.Option(help="Layers.", show_default="4, or 8 with a prompt of 32768 tokens or more")
    ] = None
    density: Annotated[
        int | None, typer.Option(help="One more column: half streaming, the other heads read this percent of blocks.")
    ] = None
    static: Static = True
    kvpress: Annotated[
        str | None,
        typer.Option(help="One more column: a press of kvpress, in quotes, e.g. KnormPress(compression_ratio=0.5)"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Real(Measured):
    model: Model
    tokens: Prompts = "128,1024"
    batch: Annotated[str, typer.Option(help="Sequences at once: 1,4.")] = "1"
    threads: Annotated[
        str | None, typer.Option(help="Threads of every column: 1,2.", show_default="torch's own choice")
    ] = None
    steps: Annotated[int, typer.Option("--decode-tokens", help="Tokens decoded per timing.", min=1)] = 16
    config: Annotated[
        str | None,
        typer.Option(
            help="Of the column config: auto, a shipped name, a .yaml, or a Hub repository.",
            show_default="auto, or no such column where it finds none",
        ),
    ] = None
    sink: Sink = 64
    recent: Recent = 256
    kernel: Annotated[
        str | None, typer.Option(help="Of the patched columns: auto, cpu, ...", show_default="auto; of config, its own")
    ] = None
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="One more column: the same checkpoint as a .gguf, by llama-cpp-python.", dir_okay=False),
    ] = None
    rounds: Rounds = 3


@dataclass(frozen=True)
class Crossover(Measured):
    tokens: Prompts = "512,1024,2048,4096,8192,16384,32768"
    dtype: Dtypes = "fp32"
    config: Annotated[
        str | None,
        typer.Option(help="Take shape, roles and patterns from this shipped config, .yaml, or Hub repository."),
    ] = None
    pattern: Annotated[
        str | None, typer.Option(help="WORD or WORD:field=value:field=value.", show_default="the config's")
    ] = None
    table: Annotated[str | None, typer.Option(help="One of the config's tables of patterns.")] = None
    kernel: ConfigsKernel = None
    heads: Annotated[int | None, typer.Option(help="Query heads, without --config.", show_default="32")] = None
    kv_heads: Annotated[int | None, typer.Option(help="KV heads, half of them measured.", show_default="8")] = None
    head_dim: Annotated[int | None, typer.Option(help="Dimension of a head.", show_default="64")] = None
    decode: Annotated[
        str | None,
        typer.Option(help="Measure decoded tokens instead, by this selection: WORD or WORD:field=value:..."),
    ] = None


@dataclass(frozen=True)
class Kernels(Measured):
    tokens: Annotated[str, typer.Option(help="Lengths of the prompts, and of the filled caches: 512,4k.")] = "512,4096"
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 2
    head_dim: Annotated[str, typer.Option(help="Dimensions of a head: 64,128.")] = "64,128"
    sink: Sink = 64
    recent: Recent = 256
    rows: Annotated[
        Path | None,
        typer.Option(help="Put what auto goes by into this .json; rows of other machines in it stay.", dir_okay=False),
    ] = None


@dataclass(frozen=True)
class Gpu:
    tokens: Prompts = "16384,32768,65536,131072"
    decode_tokens: Caches = "32768,131072,524288,1048576"
    densities: Densities = "5,10,20"
    retrieval: Annotated[str, typer.Option(help="Percents of the KV heads that keep all, in decoding.")] = "25,50"
    kernels: Annotated[str, typer.Option(help="Kernels to measure.")] = "triton,flash,cpu"
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8
    head_dim: HeadDim = 128
    sink: Sink = 64
    recent: Recent = 256
    rounds: Rounds = 10
    seed: Annotated[int, typer.Option(help="Random seed of the tensors.")] = 0
    json: Json = None
