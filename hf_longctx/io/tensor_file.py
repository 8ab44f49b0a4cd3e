"""A safetensors file written tensor by tensor, without a second copy of any, and read back with every byte checked.

The format is eight bytes with the length of a JSON header, the header, and the numbers in the order it names. Its
metadata has a CRC-32 of every tensor and one of all the rest: that finds damage, not forgery.
"""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CacheError

PIECE = 4 << 20  # bytes that are checked and written at a time, so that memory is read once; copied where it must be
# keys of the metadata
TENSORS = "tensors_crc32"
REST = "crc32"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Check = Callable[[str, Tensor], None] | None


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Check = None) -> None:
    """Write the tensors, of any strides and on any device; the same tensors give the same bytes.

    Args:
        check: called with the name and every piece of a tensor before it is written, while it is in the processor's
            cache; it may raise.
    """
    # As safetensors orders them: widest numbers first, so that all of them are aligned.
    ordered = {name: tensors[name] for name in sorted(tensors, key=lambda name: -tensors[name].element_size())}
    sums = dict.fromkeys(ordered, 0)
    file.write(_header(ordered, metadata, sums))
    for name, tensor in ordered.items():
        for piece in pieces(tensor):
            data = _bytes(piece)
            if check is not None:
                check(name, piece)
            sums[name] = zlib.crc32(data, sums[name])
            file.write(data)
    file.seek(0)
    file.write(_header(ordered, metadata, sums))


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views that together are the tensor, in the order of its indices, of at most ``PIECE`` bytes (or one number)."""
    if not tensor.dim() or tensor.nbytes <= PIECE:
        yield tensor
    elif rows := PIECE // (tensor.nbytes // len(tensor)):
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from pieces(row)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of its numbers in the order of its indices."""
    crc = 0
    for piece in pieces(tensor):
        crc = zlib.crc32(_bytes(piece), crc)
    return crc


class TensorFile:
    """A file that ``write`` made; a tensor is read and checked when it is asked for.

    Args:
        check: called with the name and every piece of a tensor that is as it was written; it may raise.

    Attributes:
        metadata: as ``write`` was given it.
        shapes: dtype (a value of `DTYPES`, where it is one that ``write`` knows) and shape of every tensor, by name.

    Raises:
        CacheError: there is no such file, it is not whole, or it is something else.
    """

    def __init__(self, path: Path, check: Check = None):
        self.path = path
        self._check = check
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for whoever writes to it
                raise ValueError("it is no regular file")
            self._file = safe_open(path, "pt")
            told = dict(self._file.metadata() or {})
            if not {TENSORS, REST} <= told.keys():
                raise ValueError("it has no checksums")
            self._sums = {str(name): str(crc) for name, crc in plain(told.pop(TENSORS)).items()}
            rest = told.pop(REST)
            self.metadata = told
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.shapes = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except FileNotFoundError:
            raise CacheError(f"there is no file {path}.") from None
        except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
            raise CacheError(
                f"{path} is no file that cache.save wrote, or only a part of one ({error}). Save the cache again."
            ) from None
        if rest != _crc_of_rest(self.shapes, told, self._sums) or self.shapes.keys() != self._sums.keys():
            self._refuse("its header")

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the CPU: a view of the file, to be copied by whoever keeps it.

        Raises:
            CacheError: the file has none of that name, or its bytes are not those that were written.
        """
        if name not in self._sums:
            raise CacheError(f"{self.path} has no tensor {name}, which it must have. Save the cache again.")
        tensor = self._file.get_tensor(name)
        if self._sums[name] != f"{checksum(tensor):08x}":
            self._refuse(name)
        for piece in pieces(tensor) if self._check is not None else ():
            self._check(name, piece)
        return tensor

    def _refuse(self, what: str) -> None:
        raise CacheError(
            f"{self.path} is damaged: the checksum of {what} is another one than was written. Save the cache again."
        )


def plain(text: str) -> Any:
    """What a text of JSON says; ValueError where it is none, has NaN or infinity, or is nested too deeply."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(word: str) -> None:
    raise ValueError(f"it has {word} for a number")


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's numbers in the order of its indices; a copy where they lie otherwise, or on another device."""
    flat = tensor.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # one number is contiguous with any stride, and flatten keeps it
    return memoryview(flat.view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], sums: Mapping[str, int]) -> bytes:
    """Of the same length whatever the sums are."""
    crcs = {name: f"{crc:08x}" for name, crc in sums.items()}
    shapes = {name: [DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}
    told = {**metadata, TENSORS: _json(crcs), REST: _crc_of_rest(shapes, metadata, crcs)}
    entries = {"__metadata__": told}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + tensors[name].nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = _json(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _crc_of_rest(shapes: Mapping[str, Sequence], metadata: Mapping[str, str], crcs: Mapping[str, str]) -> str:
    told = json.dumps([shapes, metadata, crcs], sort_keys=True)
    return f"{zlib.crc32(told.encode()):08x}"


def _json(plain: object) -> str:
    return json.dumps(plain, separators=(",", ":"))
