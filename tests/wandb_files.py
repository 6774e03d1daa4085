"""Reads the file that W&B writes offline: a log in LevelDB's format of protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, row by row."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("history"):
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records; each is in one or more parts, and no part goes over the end of a block."""
    assert data[:4] == b":W&B"
    offset, parts = 7, b""
    while offset + HEADER.size <= len(data):
        if BLOCK - offset % BLOCK < HEADER.size:
            offset += BLOCK - offset % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(data, offset)
        offset += HEADER.size
        part, offset = data[offset : offset + size], offset + size
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts
