"""A safetensors file is read and changed in place, and one that is malformed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mars_shared.errors import IntegrityError
from mars_shared.weights.bits.tensor_file import DTYPES, TensorFile

UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header (JSON, or bytes as they are) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("label", DTYPES)
def test_every_dtype_is_read_as_the_safetensors_package_wrote_it(label: str, tmp_path: Path) -> None:
    dtype = getattr(torch, DTYPES[label][0])
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    save_file({"b": values, "a": values[:1].clone(), "scalar": values[0, 1].clone(), "empty": values[:0].clone()}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        assert file.tensors.keys() == {"a", "b", "scalar", "empty"}
        assert {tensor.label for tensor in file.tensors.values()} == {label}
        assert {tensor.dtype for tensor in file.tensors.values()} == {str(dtype).removeprefix("torch.")}
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
            "a": (1, 3),
            "b": (2, 3),
            "scalar": (),
            "empty": (0, 3),
        }
        bits = values.view(UNSIGNED[dtype.itemsize]).numpy()
        assert file.tensors["b"].bits.dtype == bits.dtype
        assert file.tensors["b"].bits.tolist() == bits.flatten().tolist()
        assert file.tensors["a"].bits.tolist() == bits[0].tolist()
        assert file.tensors["scalar"].bits.tolist() == [bits[0, 1]]
        assert file.tensors["empty"].bits.size == 0


def test_the_bits_are_those_of_the_number(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, -2.0, float("inf")], dtype=torch.bfloat16)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        # bfloat16: 1 bit sign, 8 bits exponent with bias 127, 7 bits fraction; 127 << 7 = 0x3F80, 128 << 7 = 0x4000, 255 << 7 = 0x7F80
        assert file.tensors["w"].bits.tolist() == [0x3F80, 0x8000 | 0x4000, 0x7F80]


def test_what_is_written_is_what_other_readers_find(tmp_path: Path) -> None:
    save_file({"v": torch.arange(4, dtype=torch.int32), "w": torch.zeros(2, 2)}, tmp_path / "x", metadata={"format": "pt"})
    with TensorFile(tmp_path / "x", writable=True) as file, safe_open(tmp_path / "x", "pt") as other:
        file.tensors["w"].bits[2] = 0x3F800000  # 1.0 in float32
        assert other.get_tensor("w").tolist() == [[0, 0], [1, 0]]
        assert other.get_tensor("v").tolist() == [0, 1, 2, 3]
    assert load_file(tmp_path / "x")["w"].tolist() == [[0, 0], [1, 0]]


def test_without_leave_to_write_nothing_can_be_written(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file, pytest.raises(ValueError, match="read-only"):
        file.tensors["w"].bits[0] = 1


def test_a_view_outlives_the_file_it_is_of(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        bits = file.tensors["w"].bits
    (tmp_path / "x").unlink()
    assert file.tensors == {}
    assert bits.view(np.float32).tolist() == [1, 1]


def test_files_without_tensors_and_padded_headers_are_read(tmp_path: Path) -> None:
    assert TensorFile(raw(tmp_path / "none", {})).tensors == {}
    assert TensorFile(raw(tmp_path / "padded", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   ', b"x")).tensors[
        "a"
    ].bits.tolist() == [120]


MALFORMED = {
    "no length": b"\x02\x00\x00",
    "nothing": b"",
    "header past the end": (3).to_bytes(8, "little") + b"{}",
    "absurd length": (2**63).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_file_without_a_whole_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(IntegrityError, match="x is no whole safetensors file: .*bytes"):
        TensorFile(tmp_path / "x")


WRONG: dict[str, tuple[object, bytes, str]] = {
    "no JSON": (b"{", b"", "Expecting"),
    "no UTF-8": (b'{"\xff":1}', b"", "utf-8"),
    "no object": ([1], b"", "dictionary"),
    "too deep": (b"[" * 100_000, b"", "nested too deeply"),
    "repeated name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "expected every name once, came a again",
    ),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", "string"),
    "field missing": ({"a": {"dtype": "U8", "shape": [1]}}, b"x", r"a\.data_offsets: Field required"),
    "field unknown": ({"a": entry(0, 1) | {"more": 1}}, b"x", r"a\.more"),
    "dtype unknown": ({"a": entry(0, 1, "F4")}, b"x", "tensor a is of dtype F4; expected one of BOOL"),
    "shape negative": ({"a": entry(0, 1, shape=[-1, -1])}, b"x", r"a\.shape\.0"),
    "shape no number": ({"a": entry(0, 1, shape=[True])}, b"x", r"a\.shape\.0"),
    "three offsets": ({"a": entry(0, 1) | {"data_offsets": [0, 1, 1]}}, b"x", r"a\.data_offsets"),
    "gap at the start": ({"a": entry(1, 2)}, b"xx", r"tensor a, U8 \[1\], is at \[1, 2\]; expected \[0, 1\]"),
    "gap between": ({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx", r"tensor b, .*\[2, 3\]; expected \[1, 2\]"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx", r"tensor b, .*\[1, 3\]; expected \[2, 4\]"),
    "backwards": ({"a": entry(0, 1), "b": entry(1, 0, shape=[0])}, b"x", r"is at \[.*\]; expected"),
    "size unlike shape": ({"a": entry(0, 4, shape=[3])}, b"xxxx", r"U8 \[3\], is at \[0, 4\]; expected \[0, 3\]"),
    "size unlike dtype": ({"a": entry(0, 2, "F32", [2])}, b"xx", r"F32 \[2\], is at \[0, 2\]; expected \[0, 8\]"),
    "data past the end": ({"a": entry(0, 4)}, b"xxx", "expected 4 bytes of tensors, came 3"),
    "data after the last": ({"a": entry(0, 2)}, b"xxx", "expected 2 bytes of tensors, came 3"),
    "data without tensors": ({}, b"x", "expected 0 bytes of tensors, came 1"),
}


@pytest.mark.parametrize(("header", "data", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_malformed_header_is_refused_and_named(header: object, data: bytes, said: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "x", header, data)
    with pytest.raises(IntegrityError, match=said) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", sorted(WRONG.keys() - {"repeated name", "three offsets", "field unknown"}))
def test_the_safetensors_package_refuses_what_is_refused_here(case: str, tmp_path: Path) -> None:
    """Three more are refused here alone; the others are wrong for everybody."""
    header, data, _ = WRONG[case]
    with pytest.raises(SafetensorError):
        safe_open(raw(tmp_path / "x", header, data), "np").keys()


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    for length in range(len(content)):
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            TensorFile(tmp_path / "x")
