"""The file of a delta: what it gives back, and that no damage to it goes unnoticed."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from mars_shared.errors import DeltaError
from mars_shared.weights.bits.checksum import MODULUS, tensor_checksum
from mars_shared.weights.bits.codec import Kind, apply, encode
from mars_shared.weights.bits.delta import MAGIC, DeltaReader, DeltaWriter
from weight_bits import changed_model, delta, zstd


def write(path: Path, model: dict[str, tuple[Any, Any]]) -> None:
    with path.open("wb") as file:
        writer = DeltaWriter(file, {"base": "3f9c", "target": "77aa"})
        for name, (old, new) in model.items():
            encoded, change = encode(old, new)
            if encoded is not None:
                writer.add(name, str(new.dtype), (2, new.size // 2), encoded, (tensor_checksum(old) + change) % MODULUS)
        writer.close()


def test_a_file_gives_back_its_meta_and_the_changed_tensors(tmp_path: Path) -> None:
    model = changed_model()
    write(tmp_path / "delta.mars", model)
    reader = DeltaReader(tmp_path / "delta.mars")
    assert reader.meta == {"base": "3f9c", "target": "77aa"}
    records = list(reader)
    assert [(record.name, record.dtype, record.shape) for record in records] == [
        ("a.weight", "uint16", (2, 48)),
        ("b", "uint32", (2, 60)),
    ]
    assert [record.encoded.kind for record in records] == [Kind.DELTA, Kind.WHOLE]
    assert list(reader) == records
    for record in records:
        bits = model[record.name][0].copy()
        apply(bits, record.encoded)
        assert np.array_equal(bits, model[record.name][1]) and tensor_checksum(bits) == record.checksum


def test_a_file_without_changes_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "delta.mars", {})
    assert list(DeltaReader(tmp_path / "delta.mars")) == []


def test_a_file_cut_off_anywhere_or_with_surplus_is_refused(tmp_path: Path) -> None:
    model = changed_model()
    path = tmp_path / "delta.mars"
    write(path, model)
    content = path.read_bytes()
    for broken in [content[:length] for length in range(len(content))] + [content + b"\0"]:
        path.write_bytes(broken)
        with pytest.raises(DeltaError, match=r"delta\.mars"):
            list(DeltaReader(path))


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    model = changed_model()
    path = tmp_path / "delta.mars"
    write(path, model)
    content = path.read_bytes()
    for place in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(content)
            broken[place] ^= flip
            path.write_bytes(broken)
            with pytest.raises(DeltaError):
                list(DeltaReader(path))


def frame(letter: bytes, body: bytes) -> bytes:
    framed = struct.pack("<cI", letter, len(body)) + body
    return framed + struct.pack("<I", crc32(framed))


HEAD = MAGIC + frame(b"M", b"{}")
ONE = zstd(b"\x00") + zstd(b"\x01")
ONE += struct.pack("<I", crc32(ONE))
LENGTHS = f"[{len(zstd(b'0'))},{len(zstd(b'1'))}]".encode()
RECORD = frame(b"R", b'["a","uint8",[4],2,1,7,' + LENGTHS + b"]") + ONE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"marsdlt\x02" + HEAD[8:], "at the start"),
        (MAGIC + RECORD, "expected a frame b'M'"),
        (MAGIC + frame(b"M", b"[1]"), "unexpected content"),
        (MAGIC + frame(b"M", b"{"), "unexpected content"),
        (MAGIC + struct.pack("<cI", b"M", 0xFFFFFFFF), "at most"),
        (MAGIC + struct.pack("<cI", b"M", 1 << 20), "cut off"),
        (HEAD, "cut off"),
        (HEAD + RECORD * 2 + frame(b"E", b"2"), "a twice"),
        (HEAD + RECORD + frame(b"E", b"2"), "expected 2 tensors and the end, came 1"),
        (HEAD + RECORD + frame(b"E", b"1") + RECORD, "bytes more"),
        (HEAD + frame(b"M", b"{}"), "expected a frame b'RE'"),
        (HEAD + frame(b"R", b'["a","uint8",[4],2,1,7,[9999999999999999999,1]]') + ONE, "cut off"),
        (HEAD + frame(b"R", b'["a","uint8",[4],2,1,7,[-1,1]]') + ONE, "unexpected content"),
        (HEAD + frame(b"R", b'["a","uint8",[4],2,5,7,[1,1]]') + ONE, "5 of 4 changed"),
        (HEAD + frame(b"R", b'["a","uint8",[4],2,1,7,[1]]') + ONE, "1 payloads"),
        (HEAD + frame(b"R", b'["a","uint8",[4],3,1,7,[1,1]]') + ONE, "unexpected content"),
        (HEAD + frame(b"R", b'["a","uint8",[4],2,1,18446744073709551616,[1,1]]') + ONE, "unexpected content"),
        (HEAD + frame(b"R", b'["a"]'), "unexpected content"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "delta.mars"
    path.write_bytes(content)
    with pytest.raises(DeltaError, match=message) as caught:
        list(DeltaReader(path))
    assert str(path) in str(caught.value)


def test_the_hand_made_file_of_these_tests_is_readable(tmp_path: Path) -> None:
    (tmp_path / "delta.mars").write_bytes(HEAD + RECORD + frame(b"E", b"1"))
    (record,) = DeltaReader(tmp_path / "delta.mars")
    bits = np.zeros(4, np.uint8)
    apply(bits, record.encoded)
    assert (record.name, record.checksum, bits.tolist()) == ("a", 7, [1, 0, 0, 0])


def test_a_writer_takes_every_tensor_once_and_of_its_own_size() -> None:
    writer = DeltaWriter(io.BytesIO(), {})
    encoded = delta(b"\x00", b"\x01", 1)
    writer.add("a", "uint16", (8,), encoded, 0)
    for name, shape in (("a", (8,)), ("b", (9,))):
        with pytest.raises(ValueError, match="not yet written, of 8 elements"):
            writer.add(name, "uint16", shape, encoded, 0)
