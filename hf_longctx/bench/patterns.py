"""Prefill patterns by their words, and queries and keys that give them something to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import strict_yaml
from ..config.words import build, short, wrong
from ..errors import ConfigError
from ..layout.blocks import BlockList
from ..prefill.base import BLOCK, PatternSpec, select
from .settings import Settings

NEAREST = 15.0  # score of a key at distance 0, above that of a key of no distance
NOISE = 0.5  # deviation of what is random in every number of a query or key
# tokens: wavelengths by which scores fall off with the distance
SHORTEST = 2 * BLOCK
LONGEST = 3e6


@dataclass(frozen=True)
class Chooser:
    """A pattern that every query head of a layer has.

    Attributes:
        name: as given, ``WORD:field=value:...``.
    """

    name: str
    spec: PatternSpec

    def choose(self, q: Tensor, k: Tensor) -> BlockList:
        """The lists of q ``[1, H, T, D]`` over k ``[1, n, T, D]``."""
        return select((self.spec,) * q.shape[1], q, k, q.shape[3] ** -0.5)


def parse(text: str, where: str, key: str = "pattern") -> dict:
    """The mapping of a config that ``WORD:field=value:...`` stands for; the word is the value of ``key``.

    Raises:
        ConfigError: a part after the word is not ``field=value``.
    """
    word, *parts = (part.strip() for part in text.split(":"))
    mapping = {key: word}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name in mapping:
            raise wrong(where, text, "WORD or WORD:field=value:field=value, each field once")
        try:
            mapping[name] = strict_yaml.read(value, name)
        except ConfigError as error:
            raise ConfigError(f"{where}.{name}: {short(value)} is not a YAML value: {error}") from None
    return mapping


def choosers(texts: tuple[str, ...]) -> list[Chooser]:
    """The patterns of these texts.

    Raises:
        ConfigError: not a pattern of retrieval heads, a field that does not fit, or a pattern that chooses nothing.
    """
    made = []
    for i, text in enumerate(texts):
        where = f"patterns[{i}]"
        spec = build("prefill", parse(text, where), "pattern", where, "retrieval")
        if spec.reads_all:
            raise wrong(where, text, "a pattern that chooses, not one that reads everything")
        made.append(Chooser(text, spec))
    return made


def local_heads(heads: int, tokens: int, settings: Settings, dtype: torch.dtype) -> Tensor:
    """Random ``[1, heads, tokens, D]`` whose queries score near keys higher, in waves, as rotated heads do.

    Used for queries and for keys. Both have the same mean, rotated by the position as rotary embeddings do it, so that
    the mean score depends on the distance alone: a sum of cosines, highest at distance 0. Without it the attention is
    so even that a pattern that looks for its peaks has to read nearly everything.
    """
    pairs = settings.head_dim // 2
    waves = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), pairs)
    angles = torch.arange(tokens)[:, None] * (2 * math.pi / waves)
    length = (NEAREST * settings.head_dim**0.5 / max(1, pairs)) ** 0.5
    x = NOISE * torch.randn(1, tokens, heads, settings.head_dim)
    x[..., : 2 * pairs] += length * torch.cat([angles.cos(), angles.sin()], -1)[:, None]
    return x.to(dtype).transpose(1, 2)
