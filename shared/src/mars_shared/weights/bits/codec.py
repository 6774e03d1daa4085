"""Lossless deltas of tensors, on the integers that their bits make: exact for every dtype and every bit pattern.

A delta is two streams of LEB128 varints, each a zstd frame of its own:

    gaps    for every changed element, how many unchanged ones lie before it since the last changed one
    steps   new - old modulo 2^n, n the bits of an element, as a signed number in zigzag order less one: -1 +1 -2 +2 are 0 1 2 3

Within one sign, neighbouring floats are neighbouring integers, so the step is the change in units of the last place. Modulo 2^n
it needs no case for NaN, infinities or -0.0, and is undone by subtraction. An order that also runs on through zero would gain
nothing: what crosses zero passes thousands of tiny floats, three bytes either way. Frames apart beat one frame for both:
their bytes have different statistics. Level 1 beats 2 and 3, in bytes, too: there is nothing to match, only to weigh.

A tensor whose delta would not pay is stored whole: its bytes by significance (all lowest ones of 2^18 elements, then all of
the next), in one zstd frame, which keeps by itself what cannot be compressed as it is. Bytes are little-endian.
Nothing here needs more memory than the tensor itself once again. Damage that leaves a delta well formed is not seen here:
`mars_shared.weights.bits.delta` guards the payloads, and the tensor's checksum tells afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import zstandard

from mars_shared.errors import DeltaError
from mars_shared.weights.bits import kernels
from mars_shared.weights.bits.checksum import MODULUS, require_bits, tensor_checksum
from mars_shared.weights.bits.kernels import BLOCK, MAX_VARINT, Bits, Bytes

LEVEL = 1
UNDO_WORTH_BYTES = 64
"""What a delta may cost more than the whole tensor, which cannot be undone: small tensors stay deltas."""
SCRATCH = 1 << 18
"""Bytes of a stream that are written before they are set aside: what stays in the processor's cache."""
PLANE = 1 << 18
"""Elements whose bytes are put in order of significance together."""


class Kind(IntEnum):
    """How a tensor is encoded, and how many payloads that takes."""

    DELTA = 2
    WHOLE = 1


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """The change of one tensor of `size` elements, `changed` of which differ; payloads are (gaps, steps) or (whole,)."""

    kind: Kind
    size: int
    changed: int
    payloads: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the payloads."""
        return sum(map(len, self.payloads))


def encode(old: Bits, new: Bits, *, update: bool = False) -> tuple[EncodedTensor | None, int]:
    """The delta from `old` to `new`, None if they are equal, and what it adds to the tensor's checksum, modulo 2^64.

    `update` makes `old` equal to `new` in the same pass.

    Raises:
        TypeError: an array is not flat, contiguous and unsigned, or `old` is read-only and shall be updated.
        ValueError: the arrays differ in type or size.
    """
    require_bits(old, writable=update)
    require_bits(new)
    if old.dtype != new.dtype or old.size != new.size:
        raise ValueError(f"expected two tensors of one type and size, came {old.size} {old.dtype} and {new.size} {new.dtype}")
    streams, changed, change = _diff(old, new, update)
    if changed == 0:
        return None, 0
    delta = None if streams is None else EncodedTensor(Kind.DELTA, new.size, changed, streams)
    if delta is not None and 2 * delta.size_bytes <= new.nbytes:
        return delta, change
    whole = EncodedTensor(Kind.WHOLE, new.size, changed, (_deflate_whole(new),))
    return (whole if delta is None or whole.size_bytes + UNDO_WORTH_BYTES < delta.size_bytes else delta), change


def apply(bits: Bits, encoded: EncodedTensor) -> int:
    """Turn the old tensor into the new one, in place; returns what that adds to its checksum, from the values found there.

    Raises:
        DeltaError: the delta is malformed or of a tensor of another size; nothing is written.
        TypeError: `bits` is not flat, contiguous, unsigned and writable.
    """
    _require_size(bits, encoded)
    if encoded.kind is Kind.DELTA:
        return int(kernels.patch(bits, *_streams(bits, encoded), False))
    whole = _inflate_whole(bits, encoded)
    change = (tensor_checksum(whole) - tensor_checksum(bits)) % MODULUS
    bits[:] = whole
    return change


def undo(bits: Bits, encoded: EncodedTensor) -> int:
    """Turn the new tensor into the old one, in place; returns what that adds to its checksum.

    Raises:
        DeltaError: the tensor was stored whole, or as for `apply`; nothing is written.
        TypeError: `bits` is not flat, contiguous, unsigned and writable.
    """
    _require_size(bits, encoded)
    _require_invertible(encoded)
    return int(kernels.patch(bits, *_streams(bits, encoded), True))


def check(bits: Bits, encoded: EncodedTensor, *, backward: bool = False) -> None:
    """Raise what `apply` would, or `undo` if `backward`, whatever the values of `bits` are; nothing is written."""
    _require_size(bits, encoded)
    if backward:
        _require_invertible(encoded)
    if encoded.kind is Kind.DELTA:
        _streams(bits, encoded)
    else:
        _inflate_whole(bits, encoded)


def _diff(old: Bits, new: Bits, update: bool) -> tuple[tuple[bytes, bytes] | None, int, int]:
    """Compressed gaps and steps (None if empty or longer than the tensor), how many elements differ, the checksum's change."""
    room = min(SCRATCH, (new.size + BLOCK) * MAX_VARINT)
    gaps, steps = np.empty(room, np.uint8), np.empty(room, np.uint8)
    parts: tuple[list[bytes], list[bytes]] = [], []
    position = free = changed = change = stream_bytes = 0
    while position < new.size:
        position, free, gaps_end, steps_end, count, part = kernels.diff(old, new, position, free, gaps, steps, update)
        changed += count
        change += part
        stream_bytes += gaps_end + steps_end
        if stream_bytes <= new.nbytes:
            parts[0].append(gaps[:gaps_end].tobytes())
            parts[1].append(steps[:steps_end].tobytes())
    if changed == 0 or stream_bytes > new.nbytes:
        return None, changed, change % MODULUS
    return (_deflate(parts[0], sum(map(len, parts[0]))), _deflate(parts[1], sum(map(len, parts[1])))), changed, change % MODULUS


def _require_size(bits: Bits, encoded: EncodedTensor) -> None:
    require_bits(bits, writable=True)
    if bits.size != encoded.size or len(encoded.payloads) != encoded.kind:
        expected = f"{bits.size} elements, {encoded.kind.value} payloads"
        raise DeltaError(f"expected a {encoded.kind.name} of {expected}; came {encoded.size}, {len(encoded.payloads)}")


def _require_invertible(encoded: EncodedTensor) -> None:
    if encoded.kind is Kind.WHOLE:
        raise DeltaError("expected a delta to undo, came a tensor stored whole: take the older version from a snapshot")


def _streams(bits: Bits, encoded: EncodedTensor) -> tuple[Bytes, Bytes]:
    """The inflated gaps and steps, safe for `kernels.patch`."""
    gaps = np.frombuffer(_inflate(encoded.payloads[0], bits.nbytes), np.uint8)
    steps = np.frombuffer(_inflate(encoded.payloads[1], bits.nbytes - gaps.size), np.uint8)
    if any(stream.size and stream[-1] >= 128 for stream in (gaps, steps)):
        raise DeltaError("expected streams of whole numbers, came one whose last number is cut off")
    largest_step = np.uint64((1 << 8 * bits.itemsize) - 2)
    counts = kernels.count_gaps(gaps, bits.size), kernels.count_steps(steps, largest_step)
    if counts != (encoded.changed, encoded.changed):
        why = f"-1: an index reaches {bits.size}, or a step is above {largest_step}"
        raise DeltaError(f"expected {encoded.changed} gaps and steps, came {counts} ({why})")
    return gaps, steps


class _Zstd(threading.local):
    """A thread's contexts: to make new ones for a frame takes longer than most frames do."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_ZSTD = _Zstd()


def _deflate(parts: Iterable[bytes | memoryview], size_bytes: int) -> bytes:
    """A frame, with its content's size in its head."""
    stream = _ZSTD.compressor.compressobj(size=size_bytes)
    return b"".join([stream.compress(part) for part in parts]) + stream.flush()


def _inflate(frame: bytes, limit: int) -> bytes:
    """The content of a frame of at most `limit` bytes."""
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= limit:
            raise DeltaError(f"expected a zstd frame of at most {limit} bytes, came one of {size}; fetch the file again")
        return _ZSTD.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DeltaError(f"expected one whole zstd frame: {error}; fetch the file again") from error


def _deflate_whole(bits: Bits) -> bytes:
    return _deflate((np.ascontiguousarray(rows.T).data for rows in _byte_rows(bits)), bits.nbytes)


def _inflate_whole(like: Bits, encoded: EncodedTensor) -> Bits:
    """The tensor, in new memory."""
    content = np.frombuffer(_inflate(encoded.payloads[0], like.nbytes), np.uint8)
    if content.size != like.nbytes:
        raise DeltaError(f"expected a whole tensor of {like.nbytes} bytes, came {content.size}")
    bits, start = np.empty_like(like), 0
    for rows in _byte_rows(bits):
        rows[...] = content[start : start + rows.size].reshape(rows.shape[::-1]).T
        start += rows.size
    return bits


def _byte_rows(bits: Bits) -> Iterator[Bytes]:
    """Views (elements, bytes of an element) of PLANE elements each."""
    for start in range(0, bits.size, PLANE):
        yield bits[start : start + PLANE].view(np.uint8).reshape(-1, bits.itemsize)
