"""Ad-hoc groups: from what a user sends to a prompt, and from a group to what a user gets."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any
from uuid import uuid4

import httpx
from pydantic import Field, ValidationError

from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    BoxesTruth,
    Contract,
    Decoding,
    Kind,
    Prompt,
    Purpose,
    RolloutGroup,
    SamplingSpec,
    Score,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    Source,
    TextTruth,
    Truth,
    Unscored,
    View,
)
from mars_shared.contracts.prompt import Box, SourceName
from mars_shared.errors import InputError, NotReadyError
from mars_shared.frames import box_faults, resolved_box_frame
from mars_shared.http import explain_validation
from mars_shared.images import media_type_of, open_image
from mars_shared.logs import GROUP_HEADER
from mars_shared.settings import Deployment, Recipe

_BLOB = re.compile(r"[0-9a-f]{64}")
MAX_COMPLETIONS = 4096
"""Of one request: as many as the reward service scores at a time."""
SCORING_S = 300.0
"""Longest wait for the scores of a group; custom rewards may take their time."""
PROMPT_ID = "adhoc"
"""Every ad-hoc prompt's id, so that the same question, images and seed give the same completions."""


class NamedImage(Contract):
    """`image`: a data URL (data:image/png;base64,...) or the blake3 hash of bytes in the blob store."""

    name: SourceName
    image: str


class GroupRequest(Contract):
    """Body of POST /v1/rollouts. What is left out is as in the recipe.

    `truth`: the right answer as text, or boxes (x1, y1, x2, y2) in pixels of the first image.
    """

    question: str = Field(min_length=1, max_length=100_000)
    sources: tuple[NamedImage, ...] = Field(min_length=1, max_length=64)
    truth: Annotated[str, Field(min_length=1)] | tuple[Box, ...] | None = None
    num_generations: int | None = None
    num_mono: int | None = None
    mono_view: View | None = None
    mono_decoding: Decoding | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_completion_length: int | None = None
    seed: int = Field(default=0, ge=0)


class GroupAnswer(Contract):
    """A group with, if a truth was given, one score or error per completion and the gain of seeing all sources.

    Without a score for each there is no gain.
    """

    group: RolloutGroup
    scores: tuple[Score | Unscored, ...] | None = None
    recipe: str | None = None
    gain: float | None = Field(default=None, description="mean multi-source reward - mean mono-source reward")


def parse_json(body: bytes) -> GroupRequest:
    """A request from a JSON body.

    Raises:
        InputError: names what is wrong.
    """
    try:
        return GroupRequest.model_validate_json(body)
    except ValidationError as error:
        raise InputError(f"request: {explain_validation(error.errors(include_url=False))}") from error


def parse_form(fields: Sequence[tuple[str, str]], files: Sequence[tuple[str, bytes]]) -> GroupRequest:
    """A request from a multipart form: a file's field name is the source's name, text fields are as in JSON.

    Example:
        curl -F visible=@a.png -F infrared=@b.png -F 'question=Which digit?' -F truth=7 URL

    Raises:
        InputError: names what is wrong.
    """
    names = [name for name, _ in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"form fields {twice} were given more than once; expected each once")
    values: dict[str, Any] = dict(fields)
    if "sources" in values:
        raise InputError("form field 'sources': send each image as a file whose field name is the source's name")
    if re.match(r"\s*\[\s*\[", values.get("truth", "")):
        values["truth"] = _boxes(values["truth"])
    values["sources"] = [{"name": name, "image": _data_url(data, name)} for name, data in files]
    try:
        return GroupRequest.model_validate(values)
    except ValidationError as error:
        raise InputError(f"form: {explain_validation(error.errors(include_url=False))}") from error


def _boxes(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"form field 'truth': not JSON ({error}); expected boxes [[x1, y1, x2, y2], ...]") from error


def _data_url(data: bytes, name: str) -> str:
    return f"data:{media_type_of(data, what=f'source {name!r}')};base64,{base64.b64encode(data).decode()}"


class AdhocPrompts:
    """Turns requests into prompts; images go into the blob store as uploads, which expire."""

    def __init__(self, recipe: Recipe, blobs: BlobStore) -> None:
        """Raises ConfigError: the frame in which the model writes boxes is unknown."""
        self._recipe = recipe
        self._box_frame = resolved_box_frame(recipe.model)
        self._blobs = blobs

    def prompt(self, request: GroupRequest) -> Prompt:
        """A prompt for the group that was asked for.

        Raises:
            InputError: an image or a parameter is wrong (its subclasses carry the HTTP status).
        """
        names = [item.name for item in request.sources]
        sampling = self._sampling(request)
        completions = sampling.num_generations + len(names) * sampling.num_mono
        if completions > MAX_COMPLETIONS:
            raise InputError(f"request: asks for {completions} completions; expected at most {MAX_COMPLETIONS}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"sources {twice} were given more than once; expected each name once")
        first_size_px: tuple[int, int] | None = None
        sources = []
        for item in request.sources:
            what = f"source {item.name!r}"
            data = self._bytes(item.image, what)
            image = open_image(data, what=what, max_pixels=self._recipe.data.max_image_pixels)
            first_size_px = first_size_px or image.size
            sources.append(Source(name=item.name, blob=self._blobs.put_upload(data), media_type=media_type_of(data, what=what)))
        assert first_size_px is not None
        try:
            return Prompt(
                task_id=f"{PROMPT_ID}-{uuid4().hex}",
                prompt_id=PROMPT_ID,
                run=self._recipe.run.name,
                purpose=Purpose.ADHOC,
                epoch=0,
                dispatch_index=0,
                question=request.question,
                sources=tuple(sources),
                truth=_truth(request, first_size_px),
                box_frame=self._box_frame,
                sampling=sampling,
            )
        except ValidationError as error:
            raise InputError(f"request: {explain_validation(error.errors(include_url=False))}") from error

    def _bytes(self, image: str, what: str) -> bytes:
        if _BLOB.fullmatch(image):
            return self._blobs.get(image)
        header, comma, encoded = image.partition(",")
        if not (comma and header.startswith("data:") and header.endswith(";base64")):
            raise InputError(f"{what}: {image[:40]!r}... is no base64 data URL and no blob hash; other URLs are never fetched")
        try:
            return base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise InputError(f"{what}: the data URL is not base64 ({error})") from error

    def _sampling(self, request: GroupRequest) -> SamplingSpec:
        asked = {name: getattr(request, name) for name in SamplingSpec.model_fields if name in GroupRequest.model_fields}
        given = {name: value for name, value in asked.items() if value is not None}
        try:
            return SamplingSpec.model_validate(self._recipe.rollout.spec(request.seed).model_dump() | given)
        except ValidationError as error:
            raise InputError(f"request: {explain_validation(error.errors(include_url=False))}") from error


def _truth(request: GroupRequest, size_px: tuple[int, int]) -> Truth | None:
    if request.truth is None:
        return None
    if isinstance(request.truth, str):
        return TextTruth(text=request.truth)
    if faults := box_faults(request.truth, size_px):
        raise InputError(f"truth: {'; '.join(faults)}")
    return BoxesTruth(boxes=request.truth, width_px=size_px[0], height_px=size_px[1])


class RewardClient:
    """Asks the reward service to score a group's completions."""

    def __init__(self, deployment: Deployment) -> None:
        key = deployment.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
        self._url = deployment.reward_url
        self._http = httpx.AsyncClient(base_url=self._url, headers=headers, timeout=SCORING_S, trust_env=False)

    async def answer(self, group: RolloutGroup) -> GroupAnswer:
        """The group with its scores, if its prompt has a truth.

        Raises:
            InputError: the reward service refuses an item.
            NotReadyError: it does not answer, or not with scores.
        """
        truth = group.prompt.truth
        if truth is None:
            return GroupAnswer(group=group)
        items = tuple(
            ScoreItem(completion=c.text, truth=truth, frame=group.view_of(c.source).frame, question=group.prompt.question)
            for c in group.completions
        )
        response = await self._score(ScoreRequest(items=items), group.group_id)
        return GroupAnswer(group=group, scores=response.scores, recipe=response.recipe, gain=_gain(group, response.scores))

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def _score(self, request: ScoreRequest, group_id: str) -> ScoreResponse:
        try:
            response = await self._http.post(
                "/v1/score",
                content=request.model_dump_json(),
                headers={"content-type": "application/json", GROUP_HEADER: group_id},
            )
        except httpx.HTTPError as error:
            raise NotReadyError(f"the reward service at {self._url} does not answer ({error}); is it running?") from error
        if response.status_code == 422:
            raise InputError(f"the reward service refused the group: {response.text[:500]}")
        if response.status_code != 200:
            raise NotReadyError(f"the reward service at {self._url} answered {response.status_code}: {response.text[:500]}")
        return ScoreResponse.model_validate_json(response.content)


def _gain(group: RolloutGroup, scores: Sequence[Score | Unscored]) -> float | None:
    rewards: dict[Kind, list[float]] = {Kind.MULTI: [], Kind.MONO: []}
    for completion, score in zip(group.completions, scores, strict=True):
        if isinstance(score, Unscored):
            return None
        rewards[completion.kind].append(score.reward)
    if not rewards[Kind.MONO]:
        return None
    return fmean(rewards[Kind.MULTI]) - fmean(rewards[Kind.MONO])
