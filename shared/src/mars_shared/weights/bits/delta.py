"""The file of a delta: what changed from one version of the weights to another, a tensor at a time.

    magic    8 bytes, the format's version in the last one
    frame M  JSON object of strings: what the file belongs to, such as its base and target
    then for every changed tensor
    frame R  JSON list: name, dtype, shape, kind, changed elements, checksum after, lengths of the payloads
    payloads one after the other, then their CRC-32
    frame E  JSON number: how many tensors; nothing follows

A frame is its letter, the length of its JSON (4 bytes, little-endian), the JSON, and the CRC-32 of all of these. Unchanged
tensors have no record. Payloads are made and read by `mars_shared.weights.bits.codec`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar
from zlib import crc32

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from mars_shared.contracts import PolicyVersion, WeightIdentity
from mars_shared.errors import DeltaError
from mars_shared.weights.bits.codec import EncodedTensor, Kind

MAGIC = b"marsdlt\x01"
MAX_FRAME_BYTES = 1 << 20
"""Of a frame's JSON."""
MAX_DIMENSIONS = 64
"""Of a tensor; as many as numpy knows."""
Parsed = TypeVar("Parsed")
_START = struct.Struct("<cI")
_CRC = struct.Struct("<I")


class _Head(NamedTuple):
    name: str
    dtype: str
    shape: Annotated[tuple[NonNegativeInt, ...], Field(max_length=MAX_DIMENSIONS)]
    kind: Kind
    changed: NonNegativeInt
    checksum: Annotated[int, Field(ge=0, lt=1 << 64)]
    payload_bytes: tuple[NonNegativeInt, ...]


_META = TypeAdapter(dict[str, str])
_HEAD = TypeAdapter(_Head)
_COUNT = TypeAdapter(NonNegativeInt)


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """A changed tensor: DeltaRecord("lm_head.weight", "bfloat16", (113, 128), encoded, 0x1234); the checksum is that afterwards."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoded: EncodedTensor
    checksum: int


def delta_meta(base: WeightIdentity, version: PolicyVersion) -> dict[str, str]:
    """What a delta's file says of itself: the weights that it changes, and the version that it leads to."""
    return {"base": base.weights_id, "version": str(version)}


class DeltaWriter:
    """Writes a delta into an open binary file, which stays its opener's to close."""

    def __init__(self, file: BinaryIO, meta: Mapping[str, str]) -> None:
        self._file = file
        self._names: set[str] = set()
        file.write(MAGIC)
        self._frame(b"M", dict(meta))

    def add(self, name: str, dtype: str, shape: tuple[int, ...], encoded: EncodedTensor, checksum: int) -> None:
        """Write a tensor's record; `checksum` is the tensor's after the change.

        Raises:
            ValueError: the name came before, or the shape has another number of elements.
        """
        if name in self._names or math.prod(shape) != encoded.size:
            raise ValueError(f"expected a tensor not yet written, of {encoded.size} elements; came {name} of shape {shape}")
        self._names.add(name)
        lengths = [len(payload) for payload in encoded.payloads]
        self._frame(b"R", [name, dtype, list(shape), encoded.kind, encoded.changed, checksum, lengths])
        for payload in encoded.payloads:
            self._file.write(payload)
        self._file.write(_CRC.pack(_crc(encoded.payloads)))

    def close(self) -> None:
        """Write the end mark; a file without it is refused by readers."""
        self._frame(b"E", len(self._names))

    def _frame(self, letter: bytes, content: Any) -> None:
        body = json.dumps(content, separators=(",", ":")).encode("ascii")
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"expected at most {MAX_FRAME_BYTES} bytes of description, came {len(body)}: {body[:80]!r}...")
        start = _START.pack(letter, len(body))
        self._file.write(start + body + _CRC.pack(_crc((start, body))))


class DeltaReader:
    """Reads a delta's file; each iteration goes through it from the start, one tensor in memory at a time.

    Raises:
        DeltaError: the file is no delta; also while iterating, where the damage lies.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self.meta: dict[str, str] = _Cursor(path, file).meta()

    def __iter__(self) -> Iterator[DeltaRecord]:
        with self._path.open("rb") as file:
            cursor = _Cursor(self._path, file)
            cursor.meta()
            yield from cursor.records()


class _Cursor:
    """A place in an open file; it allocates no more than the file still holds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._left = os.fstat(file.fileno()).st_size

    def meta(self) -> dict[str, str]:
        if (magic := self._read(len(MAGIC))) != MAGIC:
            raise self._damaged(f"expected {MAGIC!r} at the start, came {magic!r}")
        return self._parse(_META, self._frame(b"M")[1])

    def records(self) -> Iterator[DeltaRecord]:
        names: set[str] = set()
        while (frame := self._frame(b"RE"))[0] == b"R":
            record = self._record(self._parse(_HEAD, frame[1]))
            if record.name in names:
                raise self._damaged(f"expected every tensor once, came {record.name} twice")
            names.add(record.name)
            yield record
        count = self._parse(_COUNT, frame[1])
        if count != len(names) or self._left:
            raise self._damaged(f"expected {count} tensors and the end, came {len(names)} and {self._left} bytes more")

    def _record(self, head: _Head) -> DeltaRecord:
        size = math.prod(head.shape)
        if len(head.payload_bytes) != head.kind or head.changed > size:
            raise self._damaged(f"{head.name}: {head.changed} of {size} changed, {len(head.payload_bytes)} payloads")
        payloads = tuple(self._read(length) for length in head.payload_bytes)
        self._check(payloads, head.name)
        encoded = EncodedTensor(head.kind, size, head.changed, payloads)
        return DeltaRecord(head.name, head.dtype, head.shape, encoded, head.checksum)

    def _frame(self, letters: bytes) -> tuple[bytes, bytes]:
        """Letter and JSON of the next frame, which must be one of `letters`."""
        start = self._read(_START.size)
        letter, length = _START.unpack(start)
        if letter not in letters or length > MAX_FRAME_BYTES:
            raise self._damaged(f"expected a frame {letters!r} of at most {MAX_FRAME_BYTES} bytes, came {letter!r} of {length}")
        body = self._read(length)
        self._check((start, body), f"frame {letter!r}")
        return letter, body

    def _check(self, parts: tuple[bytes, ...], what: str) -> None:
        expected, came = _CRC.unpack(self._read(_CRC.size))[0], _crc(parts)
        if came != expected:
            raise self._damaged(f"{what}: expected CRC-32 {expected:08x}, came {came:08x}")

    def _parse(self, adapter: TypeAdapter[Parsed], body: bytes) -> Parsed:
        try:
            return adapter.validate_json(body)
        except ValidationError as error:
            raise self._damaged(f"unexpected content of a frame ({error.error_count()} errors): {body[:80]!r}") from error

    def _read(self, length: int) -> bytes:
        if length > self._left or len(data := self._file.read(length)) != length:
            raise self._damaged(f"expected {length} bytes more, came at most {self._left}: it was cut off")
        self._left -= length
        return data

    def _damaged(self, what: str) -> DeltaError:
        return DeltaError(f"{self._path}: {what}; fetch the file again, or take a snapshot")


def _crc(parts: tuple[bytes, ...]) -> int:
    return reduce(lambda crc, part: crc32(part, crc), parts, 0)
