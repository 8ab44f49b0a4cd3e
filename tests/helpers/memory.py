"""Memory made inside a block of code, counted by the tensors that appear and go: numbers and bytes, no timings."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """What is allocated inside.

    Attributes:
        largest: numbers in the largest memory, but for memories of exactly ``but_for`` numbers.
        live, peak: bytes of what was made inside and lives now, and the most that lived at a time. What one operation
            allocates and frees by itself is not seen.
    """

    def __init__(self, but_for: int = 0):
        super().__init__()
        self.but_for, self.largest, self.live, self.peak = but_for, 0, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given | self.known:
                self._made(tensor)
        return out

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        numbers = storage.nbytes() // tensor.element_size()
        self.largest = max(self.largest, numbers if numbers != self.but_for else 0)
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, at: int, size: int) -> None:
        self.known.discard(at)
        self.live -= size
