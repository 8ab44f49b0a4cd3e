"""A streamed segment that says no more of itself than it must."""

from __future__ import annotations

from hf_longctx.layout.segments import Segment
from hf_longctx.layout.streamed import Stored


class Halves(Stored):
    """Reads what it keeps in two blocks."""

    kind = "halves"
    saved_as = "Halves"
    joined_note = "halves were joined"

    def __init__(self, k, v):
        self.k, self.v, self.dtype = k, v, k.dtype

    def blocks(self):
        half = self.k.shape[2] // 2
        for part in (slice(0, half), slice(half, None)):
            if self.k[:, :, part].shape[2]:
                yield Segment(self.k[:, :, part], self.v[:, :, part], self.k[:, :, part].shape[2])

    def tensors(self):
        yield from (self.k, self.v)

    def map_rows(self, change):
        self.k, self.v = change(self.k), change(self.v)

    def copy(self):
        return type(self)(self.k.clone(), self.v.clone())

    def saved(self):
        return {"k": self.k, "v": self.v}, {"extra": 5}

    @classmethod
    def restored(cls, tensors, numbers, device):
        assert numbers == {"extra": 5} and device.type == "cpu"
        return cls(*(tensors[name].to(device, copy=True) for name in ("k", "v")))
