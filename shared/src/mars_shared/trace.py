"""Everything that a run's files say of one group, from all services, in the order of time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from mars_shared.contracts import Kind
from mars_shared.letters import Letter
from mars_shared.logs import log_time_s, parse_log_line, said_in
from mars_shared.records.groups import GroupRecord, group_facts
from mars_shared.records.segments import SegmentReader, segment_numbers, segment_path
from mars_shared.telemetry import read_events

EVENTS, GROUPS, DEAD = "events.jsonl", "groups", "dead letters"
"""Where something is told, besides the logs, which are called by the processes that wrote them."""


@dataclass(frozen=True)
class Moment:
    """Something that happened to a group: when (unix seconds), who tells it, in words, and as it stands there."""

    time: float
    where: str
    text: str
    entry: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, order=True)
class GroupName:
    """How a group can be called: by task id, by its prompt's id, and as the page calls it (None: it was never scored)."""

    group: str
    prompt_id: str | None = None
    name: str | None = None

    def begins_with(self, text: str) -> bool:
        return any(own is not None and own.startswith(text) for own in (self.group, self.prompt_id, self.name))


def moments_of(folder: Path, group: str) -> list[Moment]:
    """What logs, events and records of a run's folder say of the group with that task id, oldest first."""
    found = [*_logged(folder, group), *_events(folder, group), *_records(folder, group)]
    return sorted(found, key=lambda moment: moment.time)


def page_address(name: str) -> str:
    """Where the page of `mars ui` shows a group, after the address of the page itself."""
    return f"#/group?name={quote(name, safe='')}"


def moment_of_letter(letter: Letter) -> Moment:
    """A dead letter of a group."""
    raw = letter.raw
    text = f"dead letter {letter.id} in {letter.stage}, attempt {raw.attempt}: {raw.reason} (`mars dead show {letter.id}`)"
    entry = {"id": letter.id, "stage": letter.stage, "attempts": raw.attempt, "reason": raw.reason, "detail": raw.detail}
    return Moment(raw.time_s, DEAD, text, entry)


def group_names(folder: Path, beginning: str) -> list[GroupName]:
    """The groups of which an id or a name begins so; a group that has several lines has one name."""
    found: dict[str, GroupName] = {}
    for name in _named(folder, beginning):
        known = found.get(name.group, GroupName(name.group))
        found[name.group] = GroupName(name.group, known.prompt_id or name.prompt_id, known.name or name.name)
    return sorted(name for name in found.values() if name.begins_with(beginning))


def _named(folder: Path, beginning: str) -> Iterator[GroupName]:
    for path in _log_files(folder):
        for entry in _log_entries(path, '"group"'):
            if "group" in entry:
                yield GroupName(str(entry["group"]), entry.get("prompt_id"))
    for event in read_events(folder / EVENTS, "dead"):
        if "task_id" in event:
            yield GroupName(event["task_id"], event.get("prompt_id"))
    reader = SegmentReader(folder / GROUPS, group_facts)
    for line in reader.refresh():
        # Facts of evaluations lack the task id, which is in the whole line.
        if any(str(line.facts[key]).startswith(beginning) for key in ("name", "prompt_id")):
            entry = reader.entry(line)
            yield GroupName(entry["task_id"], entry["prompt_id"], line.facts["name"])


def _logged(folder: Path, group: str) -> Iterator[Moment]:
    for path in _log_files(folder):
        for entry in _log_entries(path, json.dumps(group)):
            if entry.get("group") == group:
                yield Moment(log_time_s(entry), str(entry.get("name", path.stem)), said_in(entry), entry)


def _log_files(folder: Path) -> list[Path]:
    return sorted((folder / "logs").glob("*.log"))


def _log_entries(path: Path, needle: str) -> Iterator[dict[str, Any]]:
    """Lines of a log that hold a text; most lines of a long log don't, and are not parsed."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if needle in line and (entry := parse_log_line(line)) is not None:
                yield entry


def _events(folder: Path, group: str) -> Iterator[Moment]:
    for event in read_events(folder / EVENTS):
        if event.get("task_id") == group:
            details = [f"{key} {value}" for key, value in event.items() if key not in ("time", "event", "task_id")]
            yield Moment(event["time"], EVENTS, "  ".join([f"event {event['event']}", *details]), event)


def _records(folder: Path, group: str) -> Iterator[Moment]:
    needle = json.dumps(group).encode()
    for number in segment_numbers(folder / GROUPS):
        with segment_path(folder / GROUPS, number).open("rb") as file:
            for line in file:
                if needle in line and line.endswith(b"\n") and (record := _record(line)) is not None and record.task_id == group:
                    yield Moment(record.time, GROUPS, _told(record), record.model_dump(mode="json"))


def _record(line: bytes) -> GroupRecord | None:
    try:
        return GroupRecord.model_validate_json(line)
    except ValueError:
        return None  # a killed writer tore it


def _told(record: GroupRecord) -> str:
    reward = fmean(answer.reward for answer in record.answers if answer.kind is Kind.MULTI)
    parts = [f"{record.occasion} {record.step}", record.prompt_id, f"reward {reward:.3f}"]
    parts += [f"gain {record.gain:+.3f}"] if record.gain is not None else []
    parts += ["left out"] if record.statistics is not None and not record.statistics.trained else []
    parts += [f"policy {record.policy_version}", f"by {record.replica}", f"page {page_address(record.name)}"]
    return "record: " + "  ".join(parts)
