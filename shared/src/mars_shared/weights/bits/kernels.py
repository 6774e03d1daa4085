"""The compiled loops of the weights codec: sums, comparison, varints. They check no bounds: what calls them does.

All of them stand in one file because a compiled function is cached by its own file alone: a helper changed elsewhere would
leave stale machine code behind. Values are 64-bit unsigned and positions 64-bit signed; mixing the two would give floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Bits = NDArray[Any]
"""A flat contiguous array of uint8, uint16, uint32 or uint64: the bits of a tensor."""
Bytes = NDArray[np.uint8]
Function = TypeVar("Function", bound=Callable[..., Any])

U64 = np.uint64
LANES = 1024
"""Elements of a tensor that share one multiplier; a power of two."""
BLOCK = 64
"""Elements compared at once: as many as a mask has bits."""
BATCH = 256
"""Changes decoded before they are applied."""
MAX_VARINT = 10
"""Bytes of the longest varint: 64 bits, 7 in a byte."""


def compiled(function: Function) -> Function:
    """Compile at the first call, keep the machine code on disk, run without Python's lock."""
    return cast(Function, numba.njit(cache=True, nogil=True)(function))


def _mix(number: Any) -> Any:
    """SplitMix64: the number-th of a well mixed sequence of 64-bit integers (Steele, Lea and Flood 2014)."""
    mix = (number + U64(1)) * U64(0x9E3779B97F4A7C15)
    mix = (mix ^ (mix >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> U64(27))) * U64(0x94D049BB133111EB)
    return mix ^ (mix >> U64(31))


_mixed = compiled(_mix)
LANE_WEIGHTS: NDArray[np.uint64] = _mix(np.arange(LANES, dtype=np.uint64)) | U64(1)
"""Odd multipliers of the elements of a tile."""


@compiled
def tile_weight(tile: Any) -> Any:
    """Odd multiplier of a tile of LANES elements; from another part of the sequence than those of the lanes."""
    return _mixed(U64(tile) + U64(1 << 32)) | U64(1)


@compiled
def weight(index: Any) -> Any:
    """Odd multiplier of an element."""
    return LANE_WEIGHTS[index % U64(LANES)] * tile_weight(index // U64(LANES))


@compiled
def term(value: Any, wide: Any) -> Any:
    """What is multiplied by an element's weight; folded if it is 64 bits wide."""
    bits = U64(value)
    if wide:
        bits ^= bits >> U64(32)
    return bits + U64(1)


@compiled
def weighted_sum(bits: Any) -> Any:
    """Sum of term times lane weight times tile weight over all elements, modulo 2^64."""
    wide = bits.itemsize == 8
    total = U64(0)
    for tile in range((bits.size + LANES - 1) // LANES):
        start = tile * LANES
        part = U64(0)
        for lane in range(min(LANES, bits.size - start)):
            part += term(bits[U64(start + lane)], wide) * LANE_WEIGHTS[U64(lane)]
        total += part * tile_weight(tile)
    return total


@compiled
def weighted_change(indices: Any, old: Any, new: Any) -> Any:
    """Change of `weighted_sum` when the elements at `indices` go from `old` to `new`."""
    wide = old.itemsize == 8
    total = U64(0)
    for place in range(indices.size):
        total += (term(new[place], wide) - term(old[place], wide)) * weight(U64(indices[place]))
    return total


@intrinsic  # type: ignore[untyped-decorator]
def _unequal(context: Any, old: Any, new: Any, start: Any) -> Any:
    """Mask of the BLOCK elements from `start`: bit j is set where old[start + j] != new[start + j]."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), BLOCK)

        def load(argument: int) -> Any:
            array = cgutils.create_struct_proxy(signature.args[argument])(target, builder, arguments[argument])
            place = builder.gep(array.data, [arguments[2]])
            return builder.load(builder.bitcast(place, vector.as_pointer()), align=1)

        return builder.bitcast(builder.icmp_unsigned("!=", load(0), load(1)), ir.IntType(BLOCK))

    return types.uint64(old, new, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lowest(context: Any, mask: Any) -> Any:
    """Place of the lowest set bit of a mask that is not 0."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@compiled
def _differences(old: Any, new: Any, start: Any) -> Any:
    """Mask of the elements from `start` that differ, at most BLOCK of them."""
    if start + BLOCK <= old.size:
        return _unequal(old, new, start)
    mask = U64(0)
    for place in range(old.size - start):
        if old[start + place] != new[start + place]:
            mask |= U64(1) << U64(place)
    return mask


@compiled
def _put(stream: Any, end: Any, value: Any) -> Any:
    """Append a varint; returns the stream's end after it."""
    while value >= U64(128):
        stream[end] = np.uint8(value & U64(127)) | np.uint8(128)
        value >>= U64(7)
        end += 1
    stream[end] = np.uint8(value)
    return end + 1


@compiled
def diff(old: Any, new: Any, start: Any, free: Any, gaps: Any, steps: Any, update: Any) -> Any:
    """Write gaps and steps of the elements that differ, from `start` on, until a stream might not hold one block more.

    `start` is a multiple of BLOCK, `free` the index after the last changed element. Returns where it stopped, the next
    `free`, the bytes written to either stream, how many elements differ, and the change of `weighted_sum`.
    """
    wide = old.itemsize == 8
    high = U64(64 - 8 * old.itemsize)
    gaps_end = steps_end = changed = 0
    change = U64(0)
    while start < old.size and gaps_end + BLOCK + MAX_VARINT <= gaps.size and steps_end + BLOCK * MAX_VARINT <= steps.size:
        mask = _differences(old, new, start)
        if mask:
            part = U64(0)
            while mask:
                index = start + _lowest(mask)
                mask &= mask - U64(1)
                before, after = U64(old[index]), U64(new[index])
                signed = np.int64((after - before) << high) >> np.int64(high)
                zigzag = U64((signed << np.int64(1)) ^ (signed >> np.int64(63)))
                gaps_end = _put(gaps, gaps_end, U64(index - free))
                steps_end = _put(steps, steps_end, zigzag - U64(1))
                part += (term(after, wide) - term(before, wide)) * LANE_WEIGHTS[U64(index % LANES)]
                free = index + 1
                changed += 1
                if update:
                    old[index] = new[index]
            change += part * tile_weight(start // LANES)
        start += BLOCK
    return min(start, old.size), free, gaps_end, steps_end, changed, change


@compiled
def _take(stream: Any, start: Any) -> Any:
    """Read a varint; returns it and where the next one starts. Stays in a stream whose last byte ends a varint."""
    value = U64(stream[start])
    start += 1
    if value < U64(128):
        return value, start
    value &= U64(127)
    shift = U64(7)
    while True:
        byte = U64(stream[start])
        start += 1
        value |= (byte & U64(127)) << (shift & U64(63))
        if byte < U64(128):
            return value, start
        shift += U64(7)


@compiled
def count_gaps(gaps: Any, size: Any) -> Any:
    """How many gaps a stream holds whose last byte ends a varint; -1 if one leads to `size` or beyond."""
    start = count = 0
    left = U64(size)
    while start < gaps.size:
        before = start
        gap, start = _take(gaps, start)
        if gap >= left or start - before > MAX_VARINT:
            return -1
        left -= gap + U64(1)
        count += 1
    return count


@compiled
def count_steps(steps: Any, largest: Any) -> Any:
    """How many steps a stream holds whose last byte ends a varint; -1 if one is greater than `largest`."""
    start = count = 0
    while start < steps.size:
        before = start
        step, start = _take(steps, start)
        if step > largest or start - before > MAX_VARINT:
            return -1
        count += 1
    return count


@compiled
def _next_indices(gaps: Any, start: Any, index: Any, indices: Any) -> Any:
    """Fill `indices` from a stream; returns where to go on in it, the last index, and how many there were."""
    count = 0
    while count < indices.size and start < gaps.size:
        gap, start = _take(gaps, start)
        index += np.int64(gap) + 1
        indices[count] = index
        count += 1
    return start, index, count


@compiled
def _next_steps(steps: Any, start: Any, values: Any, backward: Any) -> Any:
    """Fill `values` with signed steps modulo 2^64, negated if `backward`; returns where to go on in the stream."""
    for place in range(values.size):
        zigzag, start = _take(steps, start)
        zigzag += U64(1)
        step = (zigzag >> U64(1)) ^ (U64(0) - (zigzag & U64(1)))
        values[place] = U64(0) - step if backward else step
    return start


@compiled
def _patch_batch(bits: Any, indices: Any, steps: Any, before: Any) -> Any:
    """Add the steps; what was there goes into `before`."""
    for place in range(indices.size):
        at = U64(indices[U64(place)])
        found = U64(bits[at])
        before[U64(place)] = found
        bits[at] = found + steps[U64(place)]


@compiled
def _batch_change(indices: Any, steps: Any, before: Any, width: Any) -> Any:
    """Change of `weighted_sum` by what `_patch_batch` has done."""
    mask = ~U64(0) >> U64(64 - width)
    change = U64(0)
    for place in range(indices.size):
        found = before[U64(place)]
        after = (found + steps[U64(place)]) & mask
        change += (term(after, width == 64) - term(found, width == 64)) * weight(U64(indices[U64(place)]))
    return change


@compiled
def patch(bits: Any, gaps: Any, steps: Any, backward: Any) -> Any:
    """Add the steps (subtract them if `backward`) to the elements at the indices; returns the change of `weighted_sum`.

    A batch is decoded, then applied, then summed: unpredictable lengths of varints or long sums between them would keep the
    processor from fetching ahead.
    """
    indices, values, before = np.empty(BATCH, np.int64), np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    change = U64(0)
    index = -1
    gaps_start = steps_start = 0
    while gaps_start < gaps.size:
        gaps_start, index, count = _next_indices(gaps, gaps_start, index, indices)
        steps_start = _next_steps(steps, steps_start, values[:count], backward)
        _patch_batch(bits, indices[:count], values, before)
        change += _batch_change(indices[:count], values, before, 8 * bits.itemsize)
    return change
