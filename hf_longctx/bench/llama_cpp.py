"""llama.cpp, where llama-cpp-python is installed, as one more column of ``bench real``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .measure import Samples

LLAMA = "llama.cpp"


@dataclass(frozen=True)
class LlamaCpp:
    """A checkpoint in a GGUF file.

    Attributes:
        module: llama-cpp-python's, imported.
    """

    file: Path
    module: Any

    @classmethod
    def find(cls, file: Path) -> LlamaCpp:
        """The checkpoint in ``file``, not loaded yet.

        Raises:
            ConfigError: llama-cpp-python cannot be imported, or there is no such file.
        """
        try:
            module = importlib.import_module("llama_cpp")
        except (ImportError, OSError, RuntimeError) as error:  # the last two where its library does not load
            raise ConfigError(
                f"--llama-cpp: llama-cpp-python cannot be imported here ({error}). Install it (pip install "
                "llama-cpp-python), or leave the option out."
            ) from None
        if not file.is_file():
            raise ConfigError(f"--llama-cpp: there is no file {str(file)!r}; expected the GGUF of the same checkpoint.")
        return cls(file, module)

    def loaded(self, threads: int, tokens: int) -> LoadedLlamaCpp:
        """The model with room for so many tokens; all else is llama-cpp-python's default.

        Raises:
            ConfigError: it cannot be loaded.
        """
        both = {"n_threads": threads, "n_threads_batch": threads}  # of one token, and of a prompt
        try:
            model = self.module.Llama(model_path=str(self.file), n_ctx=tokens, verbose=False, **both)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--llama-cpp: {str(self.file)!r} cannot be loaded: {error}") from None
        return LoadedLlamaCpp(str(self.file), model)


@dataclass(frozen=True)
class LoadedLlamaCpp:
    """``turn`` is what a column of ``e2e.measure`` calls.

    Attributes:
        name: of the file.
        model: a ``llama_cpp.Llama``.
    """

    name: str
    model: Any

    def turn(self, ids: Tensor, prefill: Samples, decode: Samples, steps: int) -> dict:
        """Read all but the last ``steps`` of ``ids [1, T]`` and decode these.

        Raises:
            ConfigError: the file's vocabulary does not have these tokens.
        """
        (row,) = ids.tolist()
        known = self.model.n_vocab()
        if max(row) >= known:
            raise ConfigError(
                f"--llama-cpp: {self.name!r} has {known} tokens and MODEL's prompt has number {max(row)}. Give the "
                "GGUF of the same checkpoint."
            )
        tokens = len(row) - steps
        self.model.reset()
        prefill.time(lambda: self.model.eval(row[:tokens]))
        decode.time(lambda: [self.model.eval([token]) for token in row[tokens:]], steps)
        return {"kernel": "ggml"}
