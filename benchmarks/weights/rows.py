"""Measured versions as rows of a table: medians, ratios against a full copy, JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from mars_shared.weights.bits.kernels import Bits
from mars_shared.weights.publications import describe_file
from weights.codecs import CODECS, Sent, WeightCodec, timed

STAGES = ("diff", "encode", "write", "fetch", "verify", "apply")


@dataclass
class Row:
    """One codec at one learning rate; numbers are medians over the versions.

    Attributes:
        changed: share of the elements that differ from one version to the next.
        bytes_per_param: of what travels for a version; `delta`: the whole file.
        diff_encode_gb_s, decode_apply_gb_s: weights by the CPU seconds of one thread, hashes of files not counted.
        stall_ms: how much longer the longest pause between two tokens of a request in flight is at an update.
        write_ms: what writing the weights into the engine takes, with packing them for its kernels.
        exact: every replica holds the very bits: after all versions, and, of `delta`, after a rollback and as a joiner too.
        seconds: diff, encode and apply by CPU time of one thread; write (and fsync), fetch (a copy) and verify (hash of the
            file) by the clock. Of `delta` also what the project's own parts take in all: publish (cast, encode, write, announce),
            follow (plan, fetch, hash, rehearse, apply, check), and the engine's rehearse, load, repack and stall.
        rollback, joiner: the ways that were taken.
    """

    task: str
    params: int
    lr: float
    codec: str
    versions: int
    changed: float
    bytes_per_param: float
    diff_encode_gb_s: float
    decode_apply_gb_s: float
    stall_ms: float | None
    write_ms: float | None
    exact: bool
    seconds: dict[str, float]
    rollback: str | None = None
    joiner: str | None = None


@dataclass
class Measurements:
    """What one codec took for each version, and the bits that its receiver holds."""

    codec: WeightCodec
    sender: dict[str, Bits]
    receiver: dict[str, Bits]
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    sizes: list[int] = field(default_factory=list)

    def send(self, new: Mapping[str, Bits], file: bytes | None, folder: Path) -> None:
        """Take a version through all stages; `file`: what really travels, None for the tensors' payloads one after the other."""
        took: defaultdict[str, float] = defaultdict(float)
        sent: dict[str, Sent] = {name: self.codec.send(self.sender[name], bits) for name, bits in new.items()}
        for each in sent.values():
            took["diff"] += each.diff_s
            took["encode"] += each.encode_s
        parts = {name: each.parts for name, each in sent.items() if each.parts is not None}
        data = b"".join(map(self.codec.payload, parts.values())) if file is None else file
        took |= _travel(data, folder)
        for name, content in parts.items():
            took["apply"] += timed(lambda name=name, content=content: self.codec.receive(self.receiver[name], content))[1]
        self.sizes.append(len(data))
        for stage, value in took.items():
            self.seconds[stage].append(value)


class Comparison:
    """All codecs side by side, from one version to the next."""

    def __init__(self, first: Mapping[str, Bits], folder: Path) -> None:
        self._folder = folder
        self._last = first
        self._changed: list[float] = []
        self.params = sum(bits.size for bits in first.values())
        self.by_codec = {codec.name: Measurements(codec, _copy(first), _copy(first)) for codec in CODECS}

    def send(self, new: Mapping[str, Bits], delta: bytes) -> None:
        """One version; `delta` is the published file."""
        differing = sum(int(np.count_nonzero(self._last[name] != bits)) for name, bits in new.items())
        self._changed.append(differing / self.params)
        for name, measured in self.by_codec.items():
            measured.send(new, delta if name == "delta" else None, self._folder)
        self._last = new

    def rows(self, task: str, lr: float) -> Iterator[Row]:
        """A row per codec; `exact` says whether its receiver holds the last version."""
        for name, measured in self.by_codec.items():
            seconds = {stage: median(values) for stage, values in measured.seconds.items()}
            size_gb = sum(bits.nbytes for bits in self._last.values()) / 1e9
            yield Row(
                task=task,
                params=self.params,
                lr=lr,
                codec=name,
                versions=len(self._changed),
                changed=median(self._changed),
                bytes_per_param=median(measured.sizes) / self.params,
                diff_encode_gb_s=size_gb / max(seconds["diff"] + seconds["encode"], 1e-9),
                decode_apply_gb_s=size_gb / max(seconds["apply"], 1e-9),
                stall_ms=None,
                write_ms=None,
                exact=all((measured.receiver[key] == bits).all() for key, bits in self._last.items()),
                seconds=seconds,
            )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for people; a ratio is of bytes, full copy over codec."""
    heads = ["task", "params", "lr", "codec", "changed", "bytes/param", "ratio", "diff+enc GB/s", "dec+apply GB/s"]
    heads += [f"{stage} ms" for stage in STAGES] + ["stall ms", "load + repack ms", "exact"]
    cells = [heads, *(_cells(row, rows) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def promises(rows: Iterable[Row]) -> Iterator[tuple[str, bool]]:
    """What is promised of the deltas in these rows, and whether it is kept: (sentence, kept)."""
    yield "every receiver of every codec holds the very bits", all(row.exact for row in rows)
    for row in (row for row in rows if row.codec == "delta"):
        what = f"{row.params / 1e6:.0f} M parameters, {row.task}, lr {row.lr:g}"
        if row.lr <= 1e-6 and row.params >= 20_000_000:
            yield f"{what}: {row.bytes_per_param:.4f} bytes a parameter, at most 0.06", row.bytes_per_param <= 0.06
            yield f"{what}: diff and encode {row.diff_encode_gb_s:.2f} GB/s, at least 1.5", row.diff_encode_gb_s >= 1.5
            yield f"{what}: decode and apply {row.decode_apply_gb_s:.2f} GB/s, at least 3", row.decode_apply_gb_s >= 3
        if row.stall_ms is not None and row.write_ms is not None:
            bound_ms = 1.2 * row.write_ms + 50
            yield f"{what}: generation stalls {row.stall_ms:.0f} ms, at most {bound_ms:.0f}", row.stall_ms <= bound_ms


def write_json(rows: Iterable[Row], path: Path) -> None:
    """A list with an object per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    full = next(other for other in rows if (other.task, other.params, other.lr, other.codec) == (*_case(row), "full"))
    speeds = [f"{row.diff_encode_gb_s:.2f}", f"{row.decode_apply_gb_s:.2f}"]
    stages = [f"{row.seconds[stage] * 1e3:.1f}" for stage in STAGES]
    engine = ["-" if value is None else f"{value:.0f}" for value in (row.stall_ms, row.write_ms)]
    named = [row.task, f"{row.params / 1e6:.1f}M", f"{row.lr:.0e}", row.codec, f"{row.changed:.2%}"]
    ratio = f"{full.bytes_per_param / row.bytes_per_param:.1f}"
    return [*named, f"{row.bytes_per_param:.4f}", ratio, *speeds, *stages, *engine, str(row.exact)]


def _case(row: Row) -> tuple[str, int, float]:
    return row.task, row.params, row.lr


def _travel(data: bytes, folder: Path) -> dict[str, float]:
    """Seconds by the clock: written durably, copied to where a replica would have it, hashed."""
    written, fetched = folder / "written", folder / "fetched"
    began = perf_counter()
    with written.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    at_rest = perf_counter()
    shutil.copyfile(written, fetched)
    arrived = perf_counter()
    describe_file(fetched)
    return {"write": at_rest - began, "fetch": arrived - at_rest, "verify": perf_counter() - arrived}


def _copy(tensors: Mapping[str, Bits]) -> dict[str, Bits]:
    return {name: bits.copy() for name, bits in tensors.items()}
