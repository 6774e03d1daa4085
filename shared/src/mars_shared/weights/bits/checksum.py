"""Checksums that follow a change: of a tensor, from the changed elements alone, and of a whole model.

A tensor's checksum is the sum over i of (u_i + 1) * w_i modulo 2^64, with u_i the bits of element i as an unsigned integer
and w_i odd and well mixed: the product of an odd number of i's tile (1,024 elements) and one of i's lane in the tile, so that
a processor needs one multiplication per element for the whole sum.

Any single changed element changes it: an odd w_i has an inverse modulo 2^64, so different u_i + 1 give different products.
Two changes together escape with a chance of 2^-64 if they are odd, 2^-(64 - t) if both are multiples of 2^t, at worst 2^-48
for 16-bit and 2^-32 for 32-bit elements (both change by the sign bit alone). Top bits of 64-bit elements would always cancel,
so those are first folded, u ^ (u >> 32), which is one to one: their worst case is 2^-32, too. It guards against accidents; who
must trust neither file nor sender compares a cryptographic hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mars_shared.weights.bits import kernels
from mars_shared.weights.bits.kernels import Bits

MODULUS = 1 << 64


@dataclass(frozen=True, slots=True)
class TensorSum:
    """What the hash of a model says of one tensor: TensorSum("bfloat16", (128, 64), 0x1234)."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


def tensor_checksum(bits: Bits) -> int:
    """Checksum of a tensor's elements; 0 if there are none.

    Raises:
        TypeError: not a flat contiguous array of unsigned integers.
    """
    require_bits(bits)
    return int(kernels.weighted_sum(bits))


def checksum_change(indices: NDArray[np.integer], old: Bits, new: Bits) -> int:
    """What to add, modulo 2^64, to a tensor's checksum when the elements at `indices` (all different) go from `old` to `new`.

    Raises:
        TypeError: `old` or `new` is not flat, contiguous and unsigned.
        ValueError: lengths or types differ, or an index is negative.
    """
    require_bits(old)
    require_bits(new)
    if old.dtype != new.dtype or not indices.shape == old.shape == new.shape:
        came = f"{indices.shape} indices, {old.shape} {old.dtype}, {new.shape} {new.dtype}"
        raise ValueError(f"expected as many indices as old and new values, both of one type; came {came}")
    if indices.size and indices.min() < 0:
        raise ValueError(f"expected indices of at least 0, came {indices.min()}")
    return int(kernels.weighted_change(indices, old, new))


def model_checksum(entries: Mapping[str, TensorSum]) -> str:
    """Hash of a whole model, 64 hexadecimal digits: blake3 over one line of JSON per tensor, sorted by name."""
    hasher = blake3()
    for name, entry in sorted(entries.items()):
        line = [name, entry.dtype, list(entry.shape), f"{entry.checksum:016x}"]
        hasher.update(json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n")
    return hasher.hexdigest()


def require_bits(array: Bits, *, writable: bool = False) -> None:
    """Refuse what the compiled loops must not see.

    Raises:
        TypeError: not a flat contiguous array of unsigned integers, or read-only where it must be written.
    """
    sound = array.ndim == 1 and array.flags.c_contiguous and array.dtype.kind == "u" and array.dtype.isnative
    if not sound or (writable and not array.flags.writeable):
        came = f"{array.dtype} of shape {array.shape}, strides {array.strides}, writeable {array.flags.writeable}"
        raise TypeError(f"expected a flat contiguous array of unsigned integers{', writable' * writable}; came {came}")
