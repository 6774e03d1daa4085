"""The page's HTTP face: read-only, from the files of one run."""

from __future__ import annotations

import hmac
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from mars_shared.blobs import BlobStore
from mars_shared.errors import RecordMissingError
from mars_shared.http import create_app
from mars_shared.records.groups import GroupRecord
from mars_shared.settings import Deployment
from mars_shared.ui.access import COOKIE, KeyFromCookie, PageHeaders
from mars_shared.ui.curves import Curves
from mars_shared.ui.group_index import GroupFilter, GroupIndex
from mars_shared.ui.run_events import RunEvents, RunStatus

STATIC = Path(__file__).parent / "static"
OPEN_PATHS = frozenset({"/", "/key", *(f"/static/{path.name}" for path in STATIC.iterdir())})
"""What a browser gets before it has the key: nothing of the run."""
MAX_LISTED = 200


class ListQuery(GroupFilter):
    """What GET /v1/groups takes."""

    offset: int = Field(default=0, ge=0)
    limit: int = Field(default=50, ge=1, le=MAX_LISTED)


class GroupQuery(GroupFilter):
    """What GET /v1/group takes: a group, and the filter among whose groups it has neighbours."""

    name: str


class GroupList(BaseModel):
    """Some of the groups that pass a filter: `total` of them do, `recorded` there are, besides `unreadable` lines without one."""

    recorded: int
    unreadable: int
    total: int
    groups: list[dict[str, Any]]
    choices: dict[str, list[str]]


class OneGroup(BaseModel):
    """A group, its place among those that pass the filter (from 0; None if it does not pass), and its neighbours there."""

    name: str
    group: GroupRecord
    place: int | None
    total: int
    previous: str | None
    next: str | None


class Key(BaseModel):
    """What POST /key takes."""

    key: str = Field(max_length=4096)


def build_app(run_dir: Path, deployment: Deployment) -> FastAPI:
    """The page of a run.

    Raises:
        ConfigError: it would serve beyond loopback without a key.
    """
    app = create_app("mars page", deployment, ready=lambda: None, open_paths=OPEN_PATHS)
    app.add_middleware(KeyFromCookie)
    app.add_middleware(PageHeaders)
    app.mount("/static", StaticFiles(directory=STATIC))
    _add_entrance(app, deployment)
    _add_events(app, run_dir)
    _add_groups(app, run_dir)
    return app


def _add_entrance(app: FastAPI, deployment: Deployment) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "page.html")

    @app.post("/key", include_in_schema=False, status_code=204)
    async def key(given: Key) -> Response:
        """Keep the key in a cookie that no script reads and no other site sends; 403 if it is wrong."""
        expected = "" if deployment.api_key is None else deployment.api_key.get_secret_value()
        if not hmac.compare_digest(given.key.encode(), expected.encode()):
            return Response(status_code=403)
        response = Response(status_code=204)
        response.set_cookie(COOKIE, given.key, httponly=True, samesite="strict")
        return response


def _add_events(app: FastAPI, run_dir: Path) -> None:
    events, lock = RunEvents(run_dir / "events.jsonl"), Lock()

    @app.get("/v1/curves")
    def curves() -> Curves:
        """Metrics over steps."""
        with lock:
            events.refresh()
            return events.curves()

    @app.get("/v1/evaluations")
    def evaluations() -> list[dict[str, Any]]:
        """Held-out results, one a step."""
        with lock:
            events.refresh()
            return events.evaluations()

    @app.get("/v1/status")
    def status() -> RunStatus:
        """Where the run is, with replicas and queues as they were when the trainer last looked."""
        with lock:
            events.refresh()
            return events.status()


def _add_groups(app: FastAPI, run_dir: Path) -> None:
    index, lock, blobs = GroupIndex(run_dir / "groups"), Lock(), BlobStore(run_dir / "blobs")

    @app.get("/v1/groups")
    def groups(wanted: Annotated[ListQuery, Query()]) -> GroupList:
        """Groups that pass a filter, newest first."""
        with lock:
            index.refresh()
            names = index.names(wanted)[::-1]
            listed = index.facts(names[wanted.offset : wanted.offset + wanted.limit])
            return GroupList(
                recorded=len(index), unreadable=index.unreadable, total=len(names), groups=listed, choices=index.choices()
            )

    @app.get("/v1/group")
    def group(wanted: Annotated[GroupQuery, Query()]) -> OneGroup:
        """A whole group."""
        name = wanted.name
        with lock:
            index.refresh()
            record, names = _record(index, name), index.names(wanted)[::-1]
        place = names.index(name) if name in names else None
        return OneGroup(
            name=name,
            group=record,
            place=place,
            total=len(names),
            previous=names[place - 1] if place else None,
            next=names[place + 1] if place is not None and place + 1 < len(names) else None,
        )

    @app.get("/v1/image", response_class=Response)
    def image(group: str, source: str) -> Response:
        """The image of a group's source, as it was given."""
        with lock:
            index.refresh()
            record = _record(index, group)
        found = next((each for each in record.sources if each.name == source), None)
        if found is None:
            names = ", ".join(each.name for each in record.sources)
            raise RecordMissingError(f"group {group!r} has no source {source!r}; expected one of {names}")
        return Response(blobs.get(found.blob), media_type=found.media_type, headers={"Cache-Control": "private, max-age=86400"})


def _record(index: GroupIndex, name: str) -> GroupRecord:
    record = index.record(name)
    if record is None:
        raise RecordMissingError(f"no group {name!r} is recorded; GET /v1/groups lists those that are")
    return record
