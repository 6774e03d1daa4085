"""Writes a safetensors file a tensor at a time, from bits, without a second copy of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mars_shared.weights.bits.checksum import TensorSum
from mars_shared.weights.bits.kernels import Bits

SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
ALIGNMENT = 8


def write_tensors(path: Path, tensors: Iterable[tuple[str, TensorSum, Bits]]) -> None:
    """Write (name, dtype and shape, bits) of all tensors.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full.
    """
    listed = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, described, bits in listed:
        begin, end = end, end + bits.nbytes
        dtype = SAFETENSORS_DTYPES[described.dtype]
        header[name] = {"dtype": dtype, "shape": list(described.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, bits in listed:
            file.write(bits.data)
