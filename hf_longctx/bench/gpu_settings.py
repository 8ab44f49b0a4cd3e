"""What ``bench gpu`` runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..kernels import base as dispatch
from .settings import Settings


@dataclass(frozen=True)
class GpuSettings(Settings):
    """Shape of a layer (default: that of Llama-3.1-8B) and what to measure; ``tokens`` are the lengths of the prompts.

    Attributes:
        decode_tokens: lengths of the caches that one token is decoded over.
        retrieval: percent of the KV heads that keep every token in decoding.
        kernels: words of a config.
    """

    tokens: tuple[int, ...] = (16384, 32768, 65536, 131072)
    dtypes: tuple[str, ...] = ("bf16",)
    layers: int = 1
    head_dim: int = 128
    rounds: int = 10
    densities: tuple[int, ...] = (5, 10, 20)
    decode_tokens: tuple[int, ...] = (32768, 131072, 524288, 1048576)
    retrieval: tuple[int, ...] = (25, 50)
    kernels: tuple[str, ...] = ("triton", "flash", "cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decode_tokens or min(self.decode_tokens) < 2:
            raise ConfigError(f"decode_tokens must be lengths of at least 2, given {list(self.decode_tokens)}.")
        if any(not 1 <= percent < 100 for percent in self.retrieval):
            raise ConfigError(f"retrieval must be percents from 1 to 99, given {list(self.retrieval)}.")
        unknown = [word for word in self.kernels if word not in dispatch.names()]
        if unknown or not self.kernels:
            known = ", ".join(dispatch.names())
            raise ConfigError(f"kernel {', '.join(unknown) or '(none)'} is not known; known: {known}.")

    def roles(self, percent: int) -> list[str]:
        """The retrieval heads spread evenly, as roles of one layer."""
        count = max(1, round(self.kv_heads * percent / 100))
        whole = {i * self.kv_heads // count for i in range(count)}
        return ["".join("R" if head in whole else "S" for head in range(self.kv_heads))]
