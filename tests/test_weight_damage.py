"""Deltas that are damaged or lie: refused before anything is written, never outside the tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_shared.errors import DeltaError, IntegrityError
from mars_shared.weights.bits.codec import EncodedTensor, Kind, apply, check, encode, undo
from weight_bits import DTYPES, changed_model, delta, zstd


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (delta(b"\x08", b"\x01", 1), r"\(-1, 1\).*reaches 8"),  # index 8 of 8
        (delta(b"\x07\x00", b"\x01\x01", 2), r"\(-1, 2\).*reaches 8"),  # 7, then 8
        (delta(b"\xff" * 9 + b"\x01", b"\x01", 1), r"\(-1, 1\).*reaches 8"),  # 2^64 - 1
        (delta(b"\xff" * 9 + b"\x7f", b"\x01", 1), r"\(-1, 1\).*reaches 8"),  # does not fit 64 bits
        (delta(b"\xff" * 10 + b"\x01", b"\x01", 1), r"\(-1, 1\)"),  # eleven bytes
        (delta(b"\x00\x80", b"\x01\x01", 2), "cut off"),
        (delta(b"\x00\x00", b"\x01\x81", 2), "cut off"),
        (delta(b"\x00\x00", b"\x01", 2), "came .2, 1."),
        (delta(b"\x00\x00", b"\x01\x01", 1), "expected 1 gaps"),
        (delta(b"", b"", 1), "expected 1 gaps"),
        (delta(b"\x00", b"\xff\xff\x03", 1), r"\(1, -1\).*above 65534"),  # 65535: zigzag 2^16 does not fit 16 bits
        (delta(b"\x00", b"\x80\x80\x80\x01", 1), r"\(1, -1\)"),
        (delta(b"\x00" * 17, b"\x01", 17), "at most 16 bytes"),  # longer than the tensor
        (delta(bytes(1 << 24), b"\x01", 1), "at most 16 bytes"),  # a small frame of 16 MiB
        (delta(b"\x00" * 8, b"\x01" * 9, 8), "at most 8 bytes"),
        (delta(b"\x00", b"\x01", 1, size=9), "8 elements"),
        (EncodedTensor(Kind.DELTA, 8, 1, (zstd(b"\x00"),)), "2 payloads"),
        (EncodedTensor(Kind.DELTA, 8, 1, (b"", zstd(b"\x01"))), "zstd frame"),
        (EncodedTensor(Kind.DELTA, 8, 1, (zstd(b"\x00") * 2, zstd(b"\x01"))), "one whole zstd frame"),
        (EncodedTensor(Kind.DELTA, 8, 1, (b"junk", zstd(b"\x01"))), "zstd frame"),
        (EncodedTensor(Kind.WHOLE, 8, 1, (zstd(bytes(15)),)), "16 bytes, came 15"),
        (EncodedTensor(Kind.WHOLE, 8, 1, (zstd(bytes(17)),)), "at most 16 bytes"),
        (EncodedTensor(Kind.WHOLE, 8, 1, (zstd(bytes(16))[:-1],)), "one whole zstd frame"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_before_anything_is_written(encoded: EncodedTensor, message: str) -> None:
    bits = np.arange(8, dtype=np.uint16)
    for change in (apply, undo) if encoded.kind is Kind.DELTA else (apply,):
        with pytest.raises(DeltaError, match=message):
            change(bits, encoded)
        with pytest.raises(DeltaError, match=message):
            check(bits, encoded, backward=change is undo)
    assert np.array_equal(bits, np.arange(8))
    assert issubclass(DeltaError, IntegrityError)


def test_a_frame_that_does_not_say_its_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8))
    with pytest.raises(DeltaError, match="came one of -1"):
        apply(np.zeros(4, np.uint16), EncodedTensor(Kind.WHOLE, 4, 1, (frame,)))


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 40), st.sampled_from(DTYPES))
@settings(max_examples=300, deadline=None)
def test_random_streams_never_write_outside_the_tensor(gaps: bytes, steps: bytes, changed: int, dtype: Any) -> None:
    memory = np.zeros(100, dtype)
    bits = memory[20:80]
    try:
        apply(bits, delta(gaps, steps, changed, size=60))
    except DeltaError:
        assert not memory.any()
    assert not memory[:20].any() and not memory[80:].any()
    assert np.count_nonzero(memory) <= changed


@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_damaged_payloads_are_refused_or_leave_a_wrong_checksum(place: int, flip: int) -> None:
    for old, new in changed_model().values():
        encoded, change = encode(old, new)
        if encoded is None:
            continue
        payloads = [bytearray(payload) for payload in encoded.payloads]
        hit = payloads[place % len(payloads)]
        hit[place // len(payloads) % len(hit)] ^= flip
        bits = old.copy()
        try:
            came = apply(bits, replace(encoded, payloads=tuple(map(bytes, payloads))))
        except DeltaError:
            assert np.array_equal(bits, old)
        else:
            assert (came == change) == np.array_equal(bits, new)
