"""Checksums of tensors and models, against plain integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings

from mars_shared.weights.bits.checksum import MODULUS, TensorSum, checksum_change, model_checksum, tensor_checksum
from weight_bits import DTYPES, pairs

MIXER = 0x9E3779B97F4A7C15


def weight(index: int) -> int:
    """The weight of an element, in plain integers: SplitMix64 of its lane times that of its tile, both made odd."""

    def mixed(number: int) -> int:
        mix = (number + 1) * MIXER % MODULUS
        mix = (mix ^ mix >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
        mix = (mix ^ mix >> 27) * 0x94D049BB133111EB % MODULUS
        return mix ^ mix >> 31

    return (mixed(index % 1024) | 1) * (mixed(index // 1024 + 2**32) | 1) % MODULUS


def test_the_checksum_is_the_sum_defined_in_plain_integers() -> None:
    for dtype in DTYPES[:3]:
        bits = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 2_500, dtype, endpoint=True)
        assert tensor_checksum(bits) == sum((int(u) + 1) * weight(i) for i, u in enumerate(bits)) % MODULUS
    wide = np.random.default_rng(0).integers(0, 1 << 64, 2_500, np.uint64)
    assert tensor_checksum(wide) == sum(((int(u) ^ int(u) >> 32) + 1) * weight(i) for i, u in enumerate(wide)) % MODULUS
    assert tensor_checksum(np.zeros(0, np.uint16)) == 0


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_the_checksum_follows_the_changed_elements(pair: tuple[Any, Any]) -> None:
    old, new = pair
    (indices,) = np.nonzero(old != new)
    change = checksum_change(indices, old[indices], new[indices])
    assert (tensor_checksum(old) + change) % MODULUS == tensor_checksum(new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flipped_bits_swapped_elements_and_another_length_change_the_checksum(dtype: Any) -> None:
    bits = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 1_500, dtype, endpoint=True)
    sums = {tensor_checksum(bits), tensor_checksum(bits[:-1]), tensor_checksum(np.append(bits, dtype(0)))}
    width = 8 * bits.itemsize
    for index in (0, 1, 1_023, 1_024, 1_499):
        for bit in range(width):
            flipped = bits.copy()
            flipped[index] ^= dtype(1 << bit)
            sums.add(tensor_checksum(flipped))
    signs = bits.copy()
    signs[[3, 5]] ^= dtype(1 << width - 1)  # both by the top bit alone
    tiles = np.roll(bits, 1_024)
    assert len(sums | {tensor_checksum(signs), tensor_checksum(bits[::-1].copy()), tensor_checksum(tiles)}) == 3 + 5 * width + 3


def test_checksum_change_refuses_what_does_not_belong_together() -> None:
    two = np.zeros(2, np.uint16)
    with pytest.raises(ValueError, match="as many"):
        checksum_change(np.array([1]), two, two)
    with pytest.raises(ValueError, match="as many"):
        checksum_change(np.array([1, 2]), two, two.astype(np.uint32))
    with pytest.raises(ValueError, match="at least 0"):
        checksum_change(np.array([-1, 2]), two, two)


def test_the_hash_of_a_model_covers_names_types_shapes_and_checksums_in_any_order() -> None:
    a, b = TensorSum("bfloat16", (2, 3), 255), TensorSum("float32", (), 0)
    lines = b'["a","bfloat16",[2,3],"00000000000000ff"]\n["b","float32",[],"0000000000000000"]\n'
    assert model_checksum({"b": b, "a": a}) == model_checksum({"a": a, "b": b}) == blake3(lines).hexdigest()
    others = [replace(a, dtype="float16"), replace(a, shape=(3, 2)), replace(a, checksum=254)]
    hashes = {model_checksum({"a": a, "b": b}), model_checksum({"a": a}), model_checksum({"c": a, "b": b})}
    assert len(hashes | {model_checksum({"a": other, "b": b}) for other in others}) == 6
