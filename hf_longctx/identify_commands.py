"""The command ``hf-longctx identify``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from .assets import embedded
from .config import LongCtxConfig
from .errors import ConfigError
from .identify import identify, methods
from .identify._processes import Processes


def command(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or an embedded model (hf-longctx/tiny-llama).")],
    out: Annotated[Path, typer.Option(help="The YAML to write.", dir_okay=False)],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(methods())}.")] = "echo_induction",
    text: Annotated[Path | None, typer.Option(help="File or folder to take the documents' filler from.")] = None,
    retrieval_fraction: Annotated[float | None, typer.Option(help="Share of retrieval heads to write.")] = None,
    target_drop: Annotated[
        float | None, typer.Option(help="Find the smallest share that loses at most this much of the dense model.")
    ] = None,
    measure_tokens: Annotated[int | None, typer.Option(help="Tokens of a text --target-drop is measured on.")] = None,
    sink: Annotated[int, typer.Option(help="First tokens that streaming heads keep.")] = 64,
    recent: Annotated[int, typer.Option(help="Latest tokens that streaming heads keep.")] = 256,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, e.g. --set steps=500. May be repeated.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder where a long method saves its state and goes on.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the scores as a PNG.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: the accelerator if there is one, else the CPU.")] = None,
) -> None:
    """Measure which KV heads of a model need the whole context, and write its config.

    duo_gates trains on several processes: `accelerate launch --num_processes 2 -m hf_longctx identify ...`, or
    `torchrun --nproc-per-node 2 -m hf_longctx identify ...` on CPUs.
    """
    from transformers import AutoTokenizer

    from .loading import AutoModelForCausalLM

    given = _options(options or [])
    path, place = embedded(model), torch.device(device) if device else _device()
    processes = Processes(place)
    loaded = AutoModelForCausalLM.from_pretrained(path, longctx=False, dtype=dtype).to(place)
    config = identify(
        loaded.eval(),
        AutoTokenizer.from_pretrained(path),
        method,
        text=text,
        retrieval_fraction=retrieval_fraction,
        target_drop=target_drop,
        measure_tokens=measure_tokens,
        sink=sink,
        recent=recent,
        seed=seed,
        work=work or out.with_suffix(".work"),
        progress=processes.main,
        **given,
    )
    if processes.main:
        config.to_yaml(out)
        if plot is not None:
            from .plots import head_map, save

            save(head_map(config), plot)
        show(Console(), config, out)


def _device() -> torch.device:
    """The accelerator that is this process's own, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def _options(pairs: list[str]) -> dict[str, Any]:
    """``["steps=500"]`` as ``{"steps": 500}``, values as YAML reads them."""
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {pair!r}, expected NAME=VALUE, e.g. --set steps=500.")
        given[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return given


def show(console: Console, config: LongCtxConfig, out: os.PathLike) -> None:
    """What was found, in a few lines, and what to do with it."""
    roles = "".join(config.roles())
    curve = config.heads.measured.get("curve", [])
    if curve:
        table = Table(title="The share, measured against the dense model")
        for name in curve[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in curve:
            table.add_row(*map(str, row.values()))
        console.print(table)
    console.print(
        f"{roles.count('R')} of {len(roles)} KV heads are retrieval heads "
        f"(retrieval_fraction {config.heads.retrieval_fraction}). Written to {out}.\n"
        f'Use it: patch_model(model, "{out}")',
        markup=False,
        highlight=False,
    )
