"""Four ways to send changed weights, each one tensor at a time and on one core.

Seconds are CPU seconds of the calling thread, so that other work on the machine counts little. Nothing here hashes but
`delta`, whose checksum is part of the pass that compares.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import zstandard

from mars_shared.weights.bits import kernels
from mars_shared.weights.bits.codec import LEVEL, EncodedTensor, apply, encode
from mars_shared.weights.bits.kernels import Bits

Result = TypeVar("Result")


class Sent(NamedTuple):
    """One tensor's change: `parts` is None if nothing changed; the sender's copy equals the new tensor afterwards."""

    parts: Any
    diff_s: float
    encode_s: float


class WeightCodec(Protocol):
    """How one tensor goes from a sender, who keeps what was sent last, to a receiver."""

    name: str

    def send(self, copy: Bits, new: Bits) -> Sent:
        """What the receiver needs; `copy` becomes `new`."""

    def receive(self, bits: Bits, parts: Any) -> None:
        """Bring the receiver's tensor to the sender's."""

    def payload(self, parts: Any) -> bytes:
        """The bytes that travel."""


class Delta:
    """Ours. Diff is the comparison with varints and checksum; encode is compression and the update of the sender's copy."""

    name = "delta"

    def send(self, copy: Bits, new: Bits) -> Sent:
        _, diff_s = timed(lambda: compare(copy, new))
        (encoded, _), both_s = timed(lambda: encode(copy, new, update=True))
        return Sent(encoded, diff_s, max(0.0, both_s - diff_s))

    def receive(self, bits: Bits, parts: EncodedTensor) -> None:
        apply(bits, parts)

    def payload(self, parts: EncodedTensor) -> bytes:
        return b"".join(parts.payloads)


class Full:
    """Every byte of every tensor."""

    name = "full"

    def send(self, copy: Bits, new: Bits) -> Sent:
        data, encode_s = timed(new.tobytes)
        np.copyto(copy, new)  # which a sender of full copies need not keep
        return Sent(data, 0.0, encode_s)

    def receive(self, bits: Bits, parts: bytes) -> None:
        np.copyto(bits, np.frombuffer(parts, bits.dtype))

    def payload(self, parts: bytes) -> bytes:
        return parts


class XorZstd:
    """Old XOR new, compressed at the level that `delta` uses."""

    name = "xor_zstd"

    def send(self, copy: Bits, new: Bits) -> Sent:
        difference, diff_s = timed(lambda: copy ^ new)

        def deflate() -> bytes:
            np.copyto(copy, new)
            return bytes(zstandard.compress(difference.data, LEVEL))

        parts, encode_s = timed(deflate)
        return Sent(parts, diff_s, encode_s)

    def receive(self, bits: Bits, parts: bytes) -> None:
        np.bitwise_xor(bits, np.frombuffer(zstandard.decompress(parts), bits.dtype), out=bits)

    def payload(self, parts: bytes) -> bytes:
        return parts


class IndexValue:
    """Places and values of what differs, 4 and 2 bytes each in bfloat16."""

    name = "index_value"

    def send(self, copy: Bits, new: Bits) -> Sent:
        places, diff_s = timed(lambda: np.flatnonzero(copy != new))

        def gather() -> tuple[Bits, Bits]:
            values = new[places]
            copy[places] = values
            return places.astype(np.uint32), values

        parts, encode_s = timed(gather)
        return Sent(parts, diff_s, encode_s)

    def receive(self, bits: Bits, parts: tuple[Bits, Bits]) -> None:
        bits[parts[0]] = parts[1]

    def payload(self, parts: tuple[Bits, Bits]) -> bytes:
        return b"".join(part.tobytes() for part in parts)


CODECS: tuple[WeightCodec, ...] = (Delta(), Full(), XorZstd(), IndexValue())


def compare(old: Bits, new: Bits) -> None:
    """The comparison alone, into a scratch that is written again and again."""
    gaps, steps = np.empty(1 << 18, np.uint8), np.empty(1 << 18, np.uint8)
    position = free = 0
    while position < old.size:
        position, free, *_ = kernels.diff(old, new, position, free, gaps, steps, False)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A call's result and the CPU seconds of this thread."""
    start = thread_time()
    result = call()
    return result, thread_time() - start


def compile_all() -> float:
    """Compile the kernels or load them from the disk, so that no measurement does; returns the seconds."""
    old = np.zeros(1_000, np.uint16)
    new = old.copy()
    new[5] = 1

    def once() -> None:
        codec = Delta()
        codec.receive(old.copy(), codec.send(old.copy(), new).parts)

    return timed(once)[1]
