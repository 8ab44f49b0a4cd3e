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
        angles = by.to(x.device, torch.float64)[:, None] * torch.tensor(
            self.frequencies, dtype=torch.float64, device=x.device
        )
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
