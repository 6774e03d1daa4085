"""The weights store over HTTP, for replicas without the shared volume."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import FileResponse

from mars_shared.contracts import WeightIdentity, WeightManifest
from mars_shared.errors import WeightsMissingError
from mars_shared.weights import WeightsStore
from mars_shared.weights.publications import FOLDER
from mars_shared.weights.readers import Registration

FolderName = Annotated[str, Path(pattern=f"^{FOLDER.pattern}$")]
FileName = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]


class WeightFileResponse(FileResponse):
    """A file, or the range of it that is asked for."""

    chunk_size = 2**20


def weights_routes(store: WeightsStore) -> APIRouter:
    """The routes of `mars_shared.weights.source_http`; they run in threads, since they read the disk."""
    routes = APIRouter(prefix="/v1/weights")

    @routes.get("/head", response_model=WeightManifest)
    def head(if_none_match: Annotated[str, Header()] = "") -> Response:
        """A manifest of the announced version; 304 if it is the one that the reader knows."""
        manifest = store.head()
        if manifest is None:
            raise WeightsMissingError("no version is published yet")
        tag = f'"{manifest.weights_id}-{manifest.kind}"'
        if tag in (known.strip() for known in if_none_match.split(",")):
            return Response(status_code=304, headers={"ETag": tag})
        return Response(manifest.model_dump_json(), media_type="application/json", headers={"ETag": tag})

    @routes.get("/manifests")
    def manifests() -> list[WeightManifest]:
        """Of all publications, by version."""
        return store.manifests()

    @routes.get("/files/{folder}/{name}", response_class=FileResponse)
    def file(folder: FolderName, name: FileName) -> Response:
        """A publication's file, or a range of it."""
        path = store.root / folder / name
        if not path.is_file():
            raise WeightsMissingError(
                f"{folder}/{name} is not in the weights store; it may have been removed since it was listed"
            )
        return WeightFileResponse(path, media_type="application/octet-stream")

    @routes.post("/complaints", status_code=204)
    def complain(identity: WeightIdentity) -> None:
        """The announced weights cannot be reached: the trainer shall publish a snapshot of them."""
        store.complain(identity)

    @routes.put("/readers/{name}", status_code=204)
    def register(name: str, registration: Registration) -> None:
        """A reader lives and serves these weights; to be renewed within a minute."""
        store.register(name, registration.weights_id)

    return routes
