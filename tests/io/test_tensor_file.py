"""The file is safetensors to every other reader, tensors of any strides are written right, and damage is found."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import load

from hf_longctx import CacheError
from hf_longctx.io import tensor_file
from hf_longctx.io.tensor_file import DTYPES, TensorFile, pieces, write

pytestmark = pytest.mark.quick


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    whole = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(-90, 90, shape)
    return whole.to(dtype)


def many() -> dict[str, torch.Tensor]:
    made = {str(dtype): numbers(dtype, 3, 5, 7) for dtype in DTYPES}
    grown = torch.randn(2, 3, 50, 8)
    return {
        **made,
        "a view of a buffer": grown[:, :, 2:41],
        "turned": grown.transpose(1, 3),
        "expanded": grown[:1].expand(4, -1, -1, -1),
        "steps": grown[:, :, ::3, 1],
        "none": grown[:, :, :0],
        "one number": torch.tensor(3.5),
    }


@pytest.mark.parametrize("piece", [1, 64, 1000, 1 << 24])
def test_any_reader_of_safetensors_reads_it(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    tensors, file = many(), io.BytesIO()
    write(file, tensors, {"a": "b"})
    read = load(file.getvalue())
    assert read.keys() == tensors.keys() and len(read) == len(DTYPES) + 6
    (tmp_path / "file").write_bytes(file.getvalue())
    ours = TensorFile(tmp_path / "file")
    assert ours.metadata == {"a": "b"}
    for name, tensor in tensors.items():
        for got in (read[name], ours[name]):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.double(), tensor.double())
    with pytest.raises(CacheError, match="has no tensor nothing"):
        ours["nothing"]


def test_pieces_are_small_and_in_order(monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 100)
    for tensor in (torch.randn(2, 3, 50, 8)[:, :, :41], torch.randn(7, 300), torch.randn(900), torch.tensor(1.0)):
        parts = list(pieces(tensor))
        assert all(part.nbytes <= 100 for part in parts)
        assert torch.equal(torch.cat([part.flatten() for part in parts]), tensor.flatten())
        for part in parts:
            assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a view"


def test_tensors_that_changed_places_are_found(tmp_path):
    file = io.BytesIO()
    write(file, {"a": torch.zeros(8), "b": torch.ones(8)}, {})
    whole = bytearray(file.getvalue())
    whole[-64:] = whole[-32:] + whole[-64:-32]
    (tmp_path / "file").write_bytes(whole)
    for name in "ab":
        with pytest.raises(CacheError, match=f"damaged: the checksum of {name} "):
            TensorFile(tmp_path / "file")[name]
