"""The lossless delta codec: exact for every bit pattern and dtype, small by varints, undoable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings

from mars_shared.errors import DeltaError
from mars_shared.weights.bits import kernels
from mars_shared.weights.bits.checksum import MODULUS, tensor_checksum
from mars_shared.weights.bits.codec import EncodedTensor, Kind, apply, check, encode, undo
from weight_bits import DTYPES, pairs, sparse


def inflated(encoded: EncodedTensor) -> tuple[bytes, ...]:
    return tuple(zstandard.decompress(payload) for payload in encoded.payloads)


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_a_delta_is_exact_can_be_undone_and_carries_the_checksum_along(pair: tuple[Any, Any]) -> None:
    old, new = pair
    before, after = tensor_checksum(old), tensor_checksum(new)
    encoded, change = encode(old, new)
    assert (before + change) % MODULUS == after
    if encoded is None:
        assert np.array_equal(old, new)
        return
    assert encoded.changed == np.count_nonzero(old != new) and encoded.size == old.size
    bits = old.copy()
    assert apply(bits, encoded) == change
    assert np.array_equal(bits, new)
    if encoded.kind is Kind.DELTA:
        assert (undo(bits, encoded) + change) % MODULUS == 0
        assert np.array_equal(bits, old)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_encoding_may_update_what_was_published_in_the_same_pass(pair: tuple[Any, Any]) -> None:
    old, new = pair
    expected = encode(old.copy(), new)
    assert encode(old, new, update=True) == expected
    assert np.array_equal(old, new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_of_any_density_keep_every_element(dtype: Any) -> None:
    # More changes than the scratch holds, more than one tile and one plane, and a size that is no multiple of any.
    for every in (1, 2, 3, 50, 5_000):
        old, new = sparse(dtype, (1 << 19) + 77, every)
        bits = old.copy()
        encoded, change = encode(bits, new, update=True)
        assert encoded is not None and np.array_equal(bits, new)
        if encoded.kind is Kind.DELTA:
            assert (undo(bits, encoded) + change) % MODULUS == 0 and np.array_equal(bits, old)
        bits[:] = old
        assert apply(bits, encoded) == change == (tensor_checksum(new) - tensor_checksum(old)) % MODULUS
        assert np.array_equal(bits, new)


def test_gaps_and_steps_are_the_varints_computed_by_hand() -> None:
    old = np.zeros(20_000, np.uint16)
    new = old.copy()
    new[0] = 1  # gap 0, step +1: zigzag 2, less one 1
    new[1] = 0xFFFF  # gap 0, step -1: zigzag 1, less one 0
    new[130] = 64  # gap 128 = 0x80: bytes 80 01; step +64: 128 - 1 = 127 = 7f
    new[16515] = 65  # gap 16384 = 1 << 14: bytes 80 80 01; step +65: 130 - 1 = 129: bytes 81 01
    new[16516] = 0x8000  # gap 0; step -32768: 65535 - 1 = 65534 = 3 * 2^14 + 127 * 2^7 + 126: bytes fe ff 03
    encoded, _ = encode(old, new)
    assert encoded is not None and (encoded.kind, encoded.size, encoded.changed) == (Kind.DELTA, 20_000, 5)
    gaps, steps = inflated(encoded)
    assert gaps.hex(" ") == "00 00 80 01 80 80 01 00"
    assert steps.hex(" ") == "01 00 7f 81 01 fe ff 03"


def test_steps_of_64_bits_take_ten_bytes_at_most() -> None:
    old = np.zeros(1_000, np.uint64)
    new = old.copy()
    new[999] = 1 << 63  # step -2^63: zigzag 2^64 - 1, less one 2^64 - 2: fe, eight times ff, and the 64th bit: 01
    encoded, _ = encode(old, new)
    assert encoded is not None
    gaps, steps = inflated(encoded)
    assert gaps.hex(" ") == "e7 07"  # 999 = 7 * 128 + 103
    assert steps.hex() == "fe" + "ff" * 8 + "01"


def test_threads_do_not_disturb_each_other() -> None:
    """Contexts of the compression are used again, by their own thread alone."""

    def there_and_back(seed: int) -> bool:
        random = np.random.default_rng(seed)
        old = random.integers(0, 1 << 16, 300_000, np.uint16)
        new = old + (random.random(old.size) < 0.2).astype(np.uint16) * random.integers(1, 9, old.size, np.uint16)
        encoded, _ = encode(old, new)
        assert encoded is not None
        apply(old, encoded)
        return bool(np.array_equal(old, new))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(there_and_back, range(40)))


def test_what_does_not_pay_is_stored_whole_and_cannot_be_undone() -> None:
    old = np.random.default_rng(0).integers(0, 1 << 16, 5_000, np.uint16)
    new = np.random.default_rng(1).integers(0, 1 << 16, 5_000, np.uint16)
    encoded, _ = encode(old, new)
    assert encoded is not None and encoded.kind is Kind.WHOLE
    assert encoded.size_bytes < new.nbytes + 32  # random bits do not compress; a frame adds a few bytes
    bits = old.copy()
    apply(bits, encoded)
    assert np.array_equal(bits, new)
    check(bits, encoded)
    for backward in (lambda: undo(bits, encoded), lambda: check(bits, encoded, backward=True)):
        with pytest.raises(DeltaError, match="stored whole"):
            backward()
    assert np.array_equal(bits, new)


def test_a_tensor_that_becomes_constant_is_stored_whole_because_that_is_smaller() -> None:
    old = np.random.default_rng(0).integers(0, 1 << 16, 5_000, np.uint16)
    encoded, _ = encode(old, np.zeros_like(old))
    assert encoded is not None and encoded.kind is Kind.WHOLE and encoded.size_bytes < 50


def test_equal_and_empty_tensors_have_no_delta() -> None:
    for size in (0, 1, 1_000):
        assert encode(np.ones(size, np.uint16), np.ones(size, np.uint16)) == (None, 0)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (np.zeros((2, 2), np.uint16), "flat"),
        (np.zeros(8, np.uint16)[::2], "contiguous"),
        (np.zeros(4, np.int16), "unsigned"),
        (np.zeros(4, np.dtype(">u2")), "unsigned"),
        (np.frombuffer(bytes(8), np.uint16), "writable"),
    ],
)
def test_arrays_that_the_compiled_loops_must_not_see_are_refused(bits: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(bits, np.zeros(4, np.uint16), update=True)
    with pytest.raises(TypeError, match=message):
        apply(bits, EncodedTensor(Kind.DELTA, 4, 0, (b"", b"")))


def test_tensors_of_two_types_or_sizes_have_no_delta() -> None:
    for other in (np.zeros(4, np.uint32), np.zeros(5, np.uint16)):
        with pytest.raises(ValueError, match="one type and size"):
            encode(np.zeros(4, np.uint16), other)


def test_tensors_that_lie_at_odd_addresses_are_read_and_written() -> None:
    old, new = sparse(np.uint16, 1_000, 30)
    odd = np.frombuffer(bytearray(1 + old.nbytes), np.uint8)[1:].view(np.uint16)
    odd[:] = old
    encoded, change = encode(odd, new)
    assert encoded is not None and encoded.kind is Kind.DELTA
    assert apply(odd, encoded) == change and np.array_equal(odd, new)


def test_the_kernels_agree_on_one_block_at_a_time() -> None:
    # A scratch that holds one block of 64 elements: the comparison stops and goes on, and the streams join seamlessly.
    old, new = sparse(np.uint16, 64 * 9 + 5, 7)
    small = np.empty(64 * 10, np.uint8), np.empty(64 * 10, np.uint8)
    large = np.empty(10_000, np.uint8), np.empty(10_000, np.uint8)
    position = free = 0
    joined = [b"", b""]
    while position < old.size:
        position, free, *ends, _, _ = kernels.diff(old, new, position, free, *small, False)
        joined = [done + stream[:end].tobytes() for done, stream, end in zip(joined, small, ends, strict=True)]
    _, _, *ends, _, _ = kernels.diff(old, new, 0, 0, *large, False)
    assert joined == [stream[:end].tobytes() for stream, end in zip(large, ends, strict=True)]
