"""What a benchmark runs: sizes, dtypes, rounds."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from ..config.config import kernel_words
from ..config.words import check_word
from ..errors import ConfigError
from ..planning.sizes import DTYPES

LONG = 32768  # tokens of a long prompt
VOCABULARY = 1024  # small, so that lm_head dominates neither the memory nor the time of a 4-layer model


@dataclass(frozen=True)
class Settings:
    """Shape of the layers (default: 4 layers of the Llama-3.2-1B shape) and how to measure.

    Attributes:
        tokens: lengths to measure, one table row group each.
        dtypes: words of ``DTYPES``.
        sink, recent: tokens that streaming heads keep.
        rounds: how often every column is measured; the columns take turns.
        steps: decoded tokens per column and round.
        densities: percent of the causal blocks that block lists read in prefill, one column each.
        patterns: prefill patterns (``WORD:field=value:...``) whose choosing is timed.
        select: decode selections (``WORD:field=value:...``), two columns of decode each.
        density: percent of the causal blocks that retrieval heads read in one more column of e2e.
        static: whether stock is also measured with ``StaticCache``, in decode and e2e.
        kvpress: a press (``NAME(field=value, ...)``), one more column of e2e.
        kernel: the ``kernel`` word of the patched columns.
        threads: threads of torch, None for torch's own choice.
        seed: of the random tensors and of which KV heads are streaming.
    """

    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    layers: int = 4
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    sink: int = 64
    recent: int = 256
    rounds: int = 7
    steps: int = 3
    densities: tuple[int, ...] = (10, 20, 30)
    patterns: tuple[str, ...] = ("vertical_slash", "block_topk")
    select: tuple[str, ...] = ()
    density: int | None = None
    static: bool = True
    kvpress: str | None = None
    kernel: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "recent", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, given {getattr(self, name)}.")
        if self.sink < 0:
            raise ConfigError(f"sink must be at least 0, given {self.sink}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, given {self.threads}.")
        if any(not 1 <= density <= 100 for density in self.densities):
            raise ConfigError(f"densities must be percents from 1 to 100, given {list(self.densities)}.")
        if self.density is not None and not 1 <= self.density <= 100:
            raise ConfigError(f"density must be a percent from 1 to 100, given {self.density}.")
        check_word(self.kernel, kernel_words(), "kernel")
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads must divide heads, given {self.kv_heads} of {self.heads} heads.")
        check_sizes(self.tokens, self.dtypes)

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def as_dict(self) -> dict:
        return {**asdict(self), "hidden": self.hidden, "intermediate": 4 * self.hidden, "vocabulary": VOCABULARY}

    def all_heads(self, letter: str) -> list[str]:
        """Roles of a model whose KV heads are all ``R`` or all ``S``."""
        return [letter * self.kv_heads] * self.layers

    def half_streaming(self) -> list[str]:
        """Roles with ``kv_heads // 2`` streaming heads per layer, drawn by the seed.

        Drawn, because heads of one role that happen to be neighbours are cheaper to take apart than real ones.
        """
        if self.kv_heads < 2:
            raise ConfigError("kv_heads must be at least 2, because half of them are streaming, given 1.")
        rng = random.Random(self.seed)
        roles = []
        for _ in range(self.layers):
            streaming = rng.sample(range(self.kv_heads), self.kv_heads // 2)
            roles.append("".join("S" if head in streaming else "R" for head in range(self.kv_heads)))
        return roles


def check_sizes(tokens: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """
    Raises:
        ConfigError: no lengths, or one below 2; no dtypes, or an unknown one.
    """
    if not tokens or min(tokens) < 2:
        raise ConfigError(f"tokens must be lengths of at least 2, given {list(tokens)}.")
    unknown = [word for word in dtypes if word not in DTYPES]
    if unknown or not dtypes:
        raise ConfigError(f"dtype {', '.join(unknown) or '(none)'} is not known; known: {', '.join(DTYPES)}.")


def default_layers(benchmark: str, tokens: tuple[int, ...]) -> int:
    """4, but 8 for the whole model where a prompt is ``LONG``: with fewer, what is no layer weighs too much."""
    return 8 if benchmark == "e2e" and max(tokens, default=0) >= LONG else 4
