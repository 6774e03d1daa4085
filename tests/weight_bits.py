"""Bits of tensors for the tests of the weight codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mars_shared.weights.bits.codec import EncodedTensor, Kind

DTYPES = (np.uint8, np.uint16, np.uint32, np.uint64)
# +0, -0, one, the smallest subnormal, infinity, quiet and signalling NaN, all bits: of bfloat16, float32 and float64.
PATTERNS = {
    1: [0x00, 0x80, 0x38, 0x01, 0x7F, 0xFF, 0x7E],
    2: [0x0000, 0x8000, 0x3F80, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
    4: [0, 1 << 31, 0x3F800000, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    8: [0, 1 << 63, 0x3FF << 52, 1, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, (0x7FF << 52) + 1, (1 << 64) - 1],
}


@st.composite
def pairs(draw: Any) -> tuple[Any, Any]:
    """Two tensors of one type and size, up to all elements changed, with the special patterns of floats."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    largest = (1 << 8 * dtype.itemsize) - 1
    elements = st.sampled_from(PATTERNS[dtype.itemsize]) | st.integers(0, largest)
    old = draw(arrays.arrays(dtype, st.integers(0, 300), elements=elements))
    new = old.copy()
    if old.size:
        places = draw(st.lists(st.integers(0, old.size - 1), max_size=old.size))
        new[places] = draw(arrays.arrays(dtype, len(places), elements=elements))
    return old, new


def sparse(dtype: Any, size: int, every: int) -> tuple[Any, Any]:
    """Random bits, and the same with every so many-th element one step further."""
    old = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    new = old.copy()
    new[::every] += dtype(1)
    return old, new


def changed_model() -> dict[str, tuple[Any, Any]]:
    """Old and new bits: a delta, a tensor stored whole, one that stays."""
    old, new = np.random.default_rng(7).integers(0, 2**32, (2, 120), np.uint32)
    same = np.ones(4, np.uint8)
    return {"a.weight": sparse(np.uint16, 96, 40), "b": (old, new), "c": (same, same)}


def zstd(content: bytes) -> bytes:
    return zstandard.compress(content)


def delta(gaps: bytes, steps: bytes, changed: int, size: int = 8) -> EncodedTensor:
    return EncodedTensor(Kind.DELTA, size, changed, (zstd(gaps), zstd(steps)))
