"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..assets import FOLDER
from ..config.words import check_word
from ..errors import ConfigError
from ..io.launched import check_number
from ..planning.sizes import DTYPES as SIZED_DTYPES
from ..planning.sizes import parse_bytes, parse_tokens

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
JSON = (".json",)
PNG = (".png",)
PICTURES = (*PNG, ".pdf", ".svg")

# Of a model that is loaded.
OURS = "hf-longctx/tiny-llama or hf-longctx/smollm2-135m-instruct"
Model = Annotated[str, typer.Argument(help=f"Hub id, local folder, {OURS}.")]
Config = Annotated[str, typer.Option(help="What to patch with: auto, a shipped name, a .yaml, or a Hub repository.")]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1.", show_default="the accelerator if there is one, else the CPU"
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Yaml = Annotated[Path, typer.Option(help="The YAML to write.", dir_okay=False)]

# Of a model whose memory is calculated.
PlannedModel = Annotated[str, typer.Argument(help="Shipped config, one of its hub ids, YAML, local folder, or hub id.")]
PlannedConfig = Annotated[str | None, typer.Option(help="What to patch a folder or hub id with.", show_default="auto")]
PlannedDtype = Annotated[str, typer.Option("--dtype", help="fp32 or bf16 (fp16 takes as much).")]
Memory = Annotated[str, typer.Option(help="In all, e.g. 24GB (10^9 bytes each) or 24GiB.")]
Batch = Annotated[int, typer.Option(help="Sequences of that length.", min=1)]
PlannedChunk = Annotated[
    str,
    typer.Option(
        "--prefill-chunk-size", help="Tokens of the prompt per forward (4096 or 4k; k: 1024); 0 for all. Or --chunk."
    ),
]
Weights = Annotated[str | None, typer.Option(help="Size of the weights, e.g. 5.7GB of quantised ones.")]

# Of heads and files.
Sink = Annotated[int, typer.Option(help="First tokens that streaming heads keep.")]
Recent = Annotated[int, typer.Option(help="Latest tokens that streaming heads keep.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write versions, settings and every figure here, a .json.", dir_okay=False),
]
Png = Annotated[
    Path | None,
    typer.Option("--png", help="Draw the table as a picture here (needs matplotlib).", dir_okay=False),
]


def short_names(**names: str) -> dict[str, Any]:
    """Settings of a command: ``short_names(chunk="prefill-chunk-size")`` lets ``--chunk`` stand for the long option.

    The help shows the long name alone; in a terminal of 80 columns there is no room for both.
    """
    return {"context_settings": {"token_normalize_func": lambda name: names.get(name, name)}}


def check_output(path: Path | None, endings: tuple[str, ...], option: str) -> None:
    """Refuse what could not be written, before hours of measuring; missing folders are made.

    Raises:
        ConfigError: another ending, or a folder that cannot be made or written to.
    """
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option}: got {str(path)!r}, expected a name that ends in {' or '.join(endings)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: {path.parent} cannot be made: {error}") from None
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: the folder {path.parent} cannot be written to.")


def planned_settings(memory: str, dtype: str, batch: int, chunk: str, weights: str | None) -> dict[str, Any]:
    """The options of a model whose memory is calculated, as ``MemorySettings`` and ``LongCtxConfig.plan`` take them.

    Raises:
        ConfigError: one of them is no size, no number of tokens or no word.
    """
    check_word(dtype, SIZED_DTYPES, "--dtype")
    return {
        "memory": parse_bytes(memory, "--memory"),
        "dtype": dtype,
        "batch": batch,
        "chunk": parse_tokens(chunk, "--prefill-chunk-size", 0),
        "weights": None if weights is None else parse_bytes(weights, "--weights"),
    }


def check_picture(path: Path | None, endings: tuple[str, ...], option: str) -> None:
    """``check_output`` of a picture.

    Raises:
        ConfigError: as ``check_output``, or matplotlib is not installed.
    """
    check_output(path, endings, option)
    if path is not None:
        from ..io.plots import new_figure

        new_figure(1, 1)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write what ``--json`` asked for; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


def write_png(path: Path | None, data: dict[str, Any]) -> None:
    """Draw the picture of a benchmark that ``--png`` asked for; nothing without a path."""
    if path is not None:
        from ..bench.figures import draw
        from ..io.plots import save

        save(draw(data), path)


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, this process's accelerator, or the CPU.

    Raises:
        ConfigError: there is no such device here, or LOCAL_RANK names none.
    """
    import torch

    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"--device: got {name!r}, expected cpu, cuda, cuda:1 or the like.") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
            raise ConfigError(f"--device: {name} cannot be used here: {str(error).splitlines()[0]}") from None
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if not os.environ.get("LOCAL_RANK"):
        return torch.device(accelerator.type, 0)
    count = torch.accelerator.device_count()
    why = f"this process sees {count} device{'s' * (count != 1)} ({accelerator.type}), and each process needs its own"
    return torch.device(accelerator.type, check_number("LOCAL_RANK", why, count))


def load_model(path: str, dtype: str, device: torch.device, needs_tokenizer: bool = True) -> tuple[Any, Any]:
    """The dense model on ``device``, and its tokenizer; None where it has none and needs none.

    Raises:
        ConfigError: there is no such model, or Transformers cannot load it.
    """
    from transformers import AutoTokenizer

    from ..model.loading import AutoModelForCausalLM

    quiet = Path(path).parent == FOLDER or not sys.stderr.isatty()
    try:
        with no_bars() if quiet else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(path, longctx=False, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"MODEL: {path!r} cannot be loaded: {error}") from None
    try:
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if needs_tokenizer:
            raise ConfigError(f"MODEL: the tokenizer of {path!r} cannot be loaded: {error}") from None
        return model.eval(), None


@contextmanager
def no_bars() -> Iterator[None]:
    """Without Transformers' progress bars: for models that load in no time, and where there is no terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
