"""A safetensors file as a memory map: names, dtypes, shapes, and the bits of every tensor to read and to change in place.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {text: text}}
    the rest     the tensors without gap or overlap; offsets count from here

https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from mars_shared.errors import IntegrityError

MAX_HEADER_BYTES = 100_000_000
"""As in the format's reference implementation."""
METADATA = "__metadata__"
LENGTH_BYTES = 8
DTYPES = {
    "BOOL": ("bool", np.uint8),
    "U8": ("uint8", np.uint8),
    "I8": ("int8", np.uint8),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "F8_E5M2": ("float8_e5m2", np.uint8),
    "U16": ("uint16", np.uint16),
    "I16": ("int16", np.uint16),
    "F16": ("float16", np.uint16),
    "BF16": ("bfloat16", np.uint16),
    "U32": ("uint32", np.uint32),
    "I32": ("int32", np.uint32),
    "F32": ("float32", np.uint32),
    "U64": ("uint64", np.uint64),
    "I64": ("int64", np.uint64),
    "F64": ("float64", np.uint64),
}
"""The format's name of a dtype -> ours, and the unsigned integers of its width."""


class _Entry(BaseModel):
    """What the header says of a tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])
_METADATA = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: StoredTensor("BF16", "bfloat16", (2, 3), array of 6 uint16)."""

    label: str
    """The format's name of the dtype."""
    dtype: str
    shape: tuple[int, ...]
    bits: NDArray[Any]
    """Its elements' bits, flat, as unsigned integers: a view of the file."""


class TensorFile:
    """All tensors of a safetensors file, by name, in the order of their bytes.

    Views that are still held when the file is closed stay good; the map ends with the last of them. What is written to a
    view is seen at once by every other reader of the file.

    >>> with TensorFile(path, writable=True) as file:
    ...     file.tensors["model.norm.weight"].bits[0] ^= 1
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        """Map it and check its header.

        Raises:
            IntegrityError: it is malformed.
            OSError: it cannot be opened.
        """
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with path.open("r+b" if writable else "rb") as file:
                header = _read_header(file)
                data_start = file.tell()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
            entries = _checked(header, len(mapped) - data_start)
        except ValueError as error:
            raise IntegrityError(f"{path} is no whole safetensors file: {error}; fetch or write it again") from error
        for name, entry in entries:
            dtype, unsigned = DTYPES[entry.dtype]
            bits = np.frombuffer(mapped, unsigned, prod(entry.shape), data_start + entry.data_offsets[0])
            self.tensors[name] = StoredTensor(entry.dtype, dtype, tuple(entry.shape), bits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the tensors."""
        self.tensors = {}


def _read_header(file: BinaryIO) -> bytes:
    """The header's JSON; the file stands at the first tensor's first byte afterwards."""
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes < LENGTH_BYTES:
        raise ValueError(f"expected at least {LENGTH_BYTES} bytes, came {size_bytes}")
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES):
        raise ValueError(f"the header claims {length} bytes of the file's {size_bytes}, at most {MAX_HEADER_BYTES} are read")
    return file.read(length)


def _checked(header: bytes, data_bytes: int) -> list[tuple[str, _Entry]]:
    """Name and entry of every tensor in the order of their bytes, which fill the file without gap or overlap."""
    try:
        content = json.loads(header.decode(), object_pairs_hook=_without_repeats)
        _METADATA.validate_python(content.pop(METADATA, {}) if isinstance(content, dict) else {})
        entries = sorted(_ENTRIES.validate_python(content).items(), key=lambda item: item[1].data_offsets)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"the header's {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from error
    end = 0
    for name, entry in entries:
        if entry.dtype not in DTYPES:
            raise ValueError(f"tensor {name} is of dtype {entry.dtype}; expected one of {', '.join(DTYPES)}")
        expected = [end, end + prod(entry.shape) * np.dtype(DTYPES[entry.dtype][1]).itemsize]
        if entry.data_offsets != expected:
            raise ValueError(f"tensor {name}, {entry.dtype} {entry.shape}, is at {entry.data_offsets}; expected {expected}")
        end = expected[1]
    if end != data_bytes:
        raise ValueError(f"expected {end} bytes of tensors, came {data_bytes}")
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        raise ValueError(f"expected every name once, came {', '.join(repeated)} again")
    return content
