"""How a layer turns its queries and keys by their positions (RoPE), to undo it and to turn them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Angles that grow evenly with the position: those of every rope type but the ones that depend on the length.

    Attributes:
        frequencies: angle per position of each pair of channels, in radians.
    """

    frequencies: tuple[float, ...]

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x ``[..., T, D]`` turned on by ``by`` positions (``[T]``, any numbers), in float32 or wider.

        Channel i and channel i + R / 2 are a pair, of the first R = 2 * len(frequencies) channels; others stay.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        half = len(self.frequencies)
        angles = self._angles(by.to(x.device))
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def mean(self, dim: int, by: Tensor) -> Tensor:
        """Matrix M ``[dim, dim]``, float64: ``x @ M`` is the mean of x turned on by each of ``by`` (``[T]``)."""
        angles = self._angles(by)
        cos, sin = angles.cos().mean(0), angles.sin().mean(0)
        half = len(self.frequencies)
        made = torch.eye(dim, dtype=torch.float64, device=by.device)
        first = torch.arange(half, device=by.device)
        made[first, first] = made[first + half, first + half] = cos
        made[first, first + half], made[first + half, first] = sin, -sin
        return made

    def _angles(self, by: Tensor) -> Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=by.device)
        return by.to(torch.float64)[:, None] * frequencies
