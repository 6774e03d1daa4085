"""Segments of JSON lines: followed while they grow, each line found again, whatever ended the writer."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mars_shared.errors import IntegrityError
from mars_shared.records import segments
from mars_shared.records.segments import Line, SegmentReader, SegmentWriter, index_path, segment_numbers, segment_path

SMALL = 100
"""Bytes after which a new segment begins."""


def facts(entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry.get("n"), int):
        raise ValueError("no record")
    return {"n": entry["n"]}


def entry(n: int) -> dict[str, Any]:
    return {"n": n, "text": "x" * 20 + "é\u2028\n"}


def write(folder: Path, numbers: range) -> None:
    writer = SegmentWriter(folder, facts, segment_bytes=SMALL)
    for n in numbers:
        writer.append(entry(n))
    writer.close()


def numbers(lines: list[Line]) -> list[int]:
    return [line.facts["n"] for line in lines]


def test_lines_come_back_in_order_over_segments_and_restarts_of_the_writer(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    write(tmp_path, range(5, 9))
    reader = SegmentReader(tmp_path, facts)
    lines = reader.refresh()
    assert numbers(lines) == list(range(9))
    assert [reader.entry(line) for line in lines] == [entry(n) for n in range(9)]
    assert len(segment_numbers(tmp_path)) > 2


def test_a_full_segment_has_an_index_that_says_what_its_lines_say(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    first, *_, newest = segment_numbers(tmp_path)
    rows = [json.loads(row) for row in index_path(tmp_path, first).read_text().splitlines()]
    content = segment_path(tmp_path, first).read_bytes()
    assert [json.loads(content[row["offset"] : row["offset"] + row["size"]])["n"] for row in rows] == [0, 1]
    assert [row["facts"] for row in rows] == [{"n": 0}, {"n": 1}]
    assert not index_path(tmp_path, newest).exists()
    indexed = numbers(SegmentReader(tmp_path, facts).refresh())
    index_path(tmp_path, first).unlink()
    assert numbers(SegmentReader(tmp_path, facts).refresh()) == indexed


def test_a_reader_sees_what_is_new_and_nothing_twice(tmp_path: Path) -> None:
    reader = SegmentReader(tmp_path, facts)
    assert reader.refresh() == []
    seen = []
    writer = SegmentWriter(tmp_path, facts, segment_bytes=SMALL)
    for n in range(12):
        writer.append(entry(n))
        if n % 3 == 0:  # some segments begin and end between two looks
            seen += numbers(reader.refresh())
    assert [*seen, *numbers(reader.refresh())] == list(range(12))
    assert reader.refresh() == []


def test_a_line_that_is_not_whole_yet_comes_later_and_a_torn_one_never(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    reader = SegmentReader(tmp_path, facts)
    assert numbers(reader.refresh()) == [0]
    whole = json.dumps(entry(1)).encode() + b"\n"
    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(whole[:15])
        file.flush()
        assert reader.refresh() == []
        file.write(whole[15:])
        file.flush()
        assert numbers(reader.refresh()) == [1]
        file.write(whole[:15])
    write(tmp_path, range(2, 3))
    assert numbers(reader.refresh()) == [2]
    assert numbers(SegmentReader(tmp_path, facts).refresh()) == [0, 1, 2]


def test_a_segment_that_is_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    reader = SegmentReader(tmp_path, facts)
    (line,) = reader.refresh()
    segment_path(tmp_path, 1).unlink()
    with pytest.raises(IntegrityError, match=r"000001.jsonl: expected a line of \d+ bytes at 0"):
        reader.entry(line)


def test_a_disk_without_room_for_the_next_segment_lets_the_present_one_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SegmentWriter(tmp_path, facts, segment_bytes=SMALL)
    for n in range(2):
        writer.append(entry(n))
    with monkeypatch.context() as full:
        full.setattr(segments, "LineLog", no_room)
        writer.append(entry(2))
    assert segment_numbers(tmp_path) == [1]
    writer.append(entry(3))
    assert segment_numbers(tmp_path) == [1, 2]
    reader = SegmentReader(tmp_path, facts)
    assert [reader.entry(line)["n"] for line in reader.refresh()] == [0, 1, 2, 3]


def test_a_disk_without_room_for_an_index_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(segments, "write_atomic", no_room)
        write(tmp_path, range(5))
    assert len(segment_numbers(tmp_path)) > 1 and not list(tmp_path.glob("*.index.jsonl"))
    assert numbers(SegmentReader(tmp_path, facts).refresh()) == list(range(5))


def test_a_disk_that_breaks_otherwise_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentWriter(tmp_path, facts, segment_bytes=1)
    writer.append(entry(0))
    monkeypatch.setattr(segments, "LineLog", broken)
    with pytest.raises(OSError, match="Input/output"):
        writer.append(entry(1))


def test_the_index_is_made_of_what_was_known_of_each_line_when_it_was_written(tmp_path: Path) -> None:
    asked = []

    def counted(entry: dict[str, Any]) -> dict[str, Any]:
        asked.append(entry["n"])
        return facts(entry)

    writer = SegmentWriter(tmp_path, counted, segment_bytes=SMALL)
    segment_path(tmp_path, 1).write_bytes(b"torn")  # by a writer that was killed
    writer = SegmentWriter(tmp_path, counted, segment_bytes=SMALL)
    for n in range(5):
        writer.append(entry(n))
    assert asked == [0, 1, 2, 3, 4]
    reader = SegmentReader(tmp_path, facts)
    assert index_path(tmp_path, 1).exists() and [reader.entry(line)["n"] for line in reader.refresh()] == asked


def no_room(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*arguments: object, **options: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


DAMAGED = (b'{"n": 1, "te', b'{"n": "another version"}', b'\xff\xfe\x00"', b"[1]", b"NaN")


def test_lines_that_hold_no_record_are_passed_over_and_counted_once(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    reader = SegmentReader(tmp_path, facts)
    assert (numbers(reader.refresh()), reader.unreadable) == ([0], 0)
    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(b"".join(line + b"\n" for line in DAMAGED))
    assert (reader.refresh(), reader.unreadable) == ([], len(DAMAGED))
    write(tmp_path, range(1, 6))  # the segment is full, and gets an index
    assert (numbers(reader.refresh()), reader.unreadable) == ([1, 2, 3, 4, 5], len(DAMAGED))
    late = SegmentReader(tmp_path, facts)
    assert index_path(tmp_path, 1).exists()
    assert (numbers(late.refresh()), late.unreadable) == ([0, 1, 2, 3, 4, 5], len(DAMAGED))


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows[:-1], rows[-1][:20]],
        lambda rows: [rows[0], rows[2]],
        lambda rows: [],
        lambda rows: [rows[0], b"\xff\x00", rows[2]],
        lambda rows: [rows[0], b"[]", rows[2]],
        lambda rows: [row.replace(b'"n": ', b'"m": ') for row in rows],
        lambda rows: [rows[0], rows[1].replace(b'{"n": 1}', b"{}"), rows[2]],
        lambda rows: [rows[0].replace(b'"n": 0', b'"n": 7'), *rows[1:]],
        lambda rows: [row.replace(b'"offset": ', b'"offset": 1') for row in rows],
        lambda rows: [row.replace(b'"facts": ', b'"later": 0, "facts": ') for row in rows],
    ],
    ids=["short", "torn", "gap", "empty", "noise", "no-row", "other-facts", "lost-facts", "untrue", "elsewhere", "other-version"],
)
def test_where_an_index_is_damaged_the_segment_itself_is_read(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    writer = SegmentWriter(tmp_path, facts, segment_bytes=3 * len(json.dumps(entry(0))))
    for n in range(5):
        writer.append(entry(n))
    writer.close()
    rows = index_path(tmp_path, 1).read_bytes().splitlines()
    assert len(rows) == 3
    index_path(tmp_path, 1).write_bytes(b"\n".join(damage(rows)))
    reader = SegmentReader(tmp_path, facts)
    lines = reader.refresh()
    assert (numbers(lines), reader.unreadable) == ([0, 1, 2, 3, 4], 0)
    assert [reader.entry(line) for line in lines] == [entry(n) for n in range(5)]
