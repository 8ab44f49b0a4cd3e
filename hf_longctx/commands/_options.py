"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import FOLDER
from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
PLACE = "the accelerator if there is one, else the CPU"


def check_output(path: Path, endings: tuple[str, ...], option: str) -> None:
    """Refuse what could not be written, before hours of measuring; missing folders are made."""
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option}: got {str(path)!r}, expected a name that ends in {' or '.join(endings)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: {path.parent} cannot be made: {error}") from None


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the accelerator that is this process's own, or the CPU."""
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
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


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
