"""How many KV heads a process holds is asked of the projection that makes the keys. Two processes: tests/slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_longctx import Family, UnsupportedModelError
from hf_longctx.model.modules import tensor_parallel

HEAD_DIM = 8


class Mesh:
    def __init__(self, size: int, rank: int = 1, names: tuple[str, ...] | None = ("tp",)):
        self._size = size
        self.rank = rank
        self.mesh_dim_names = names

    def __getitem__(self, name: str) -> Mesh:
        assert name == "tp"
        return self

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return self.rank


class Gathered(nn.Linear):
    """Its own rows, and those of the other process."""

    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


class Quantised(nn.Module):
    """Bytes as its weight; it computes in bfloat16."""

    in_features = 32

    def __init__(self, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, 16, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        assert (x.dtype, x.shape[-1]) == (torch.bfloat16, 32)
        return x.new_zeros(*x.shape[:-1], self.weight.shape[0])


def spread(projection: nn.Module, mesh: Mesh | None, kv_heads: int = 4, name: str = "k_proj") -> tuple[int, int]:
    if mesh is not None:
        projection._hf_device_mesh = mesh
    module = SimpleNamespace(**{name: projection}, head_dim=HEAD_DIM, config=SimpleNamespace(dtype=torch.bfloat16))
    return tensor_parallel(module, Family("any", key_projection=name), kv_heads)


@pytest.mark.parametrize("make", [lambda rows: nn.Linear(32, rows), Quantised], ids=["plain", "quantised"])
def test_the_keys_of_a_rank_are_those_of_its_heads(make):
    assert spread(make(16), Mesh(2)) == (1, 2)
    assert spread(make(16), Mesh(2, names=None)) == (1, 2)
    assert spread(make(8), Mesh(4, rank=3, names=("dp", "tp"))) == (3, 4)


def test_a_rank_that_gets_all_keys_has_all_heads():
    assert spread(nn.Linear(32, 32), None) == (0, 1)
    assert spread(Gathered(32, 16), Mesh(2)) == (0, 1)
    assert spread(Gathered(32, 64), Mesh(2), name="qkv_proj") == (0, 1)
    assert spread(nn.Linear(32, 32), Mesh(2)) == (0, 1), "the projection is on every rank"


def test_weights_that_fsdp_spreads_leave_the_heads_together():
    assert spread(nn.Linear(32, 16), Mesh(2, names=("fsdp",))) == (0, 1)


@pytest.mark.parametrize(("kv_heads", "size", "rows"), [(3, 2, 12), (2, 4, 4), (4, 3, 11)])
def test_parts_of_a_head_are_refused(kv_heads, size, rows):
    with pytest.raises(UnsupportedModelError, match=f"{kv_heads} KV heads cannot be spread over {size} processes"):
        spread(nn.Linear(32, rows), Mesh(size), kv_heads)
