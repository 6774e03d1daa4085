"""A prompt becomes one whole, ordered group; the engine here is a script, the contract is real."""

from __future__ import annotations

import asyncio

import pytest

from mars_rollout.engine.base import BASE_VERSION
from mars_rollout.group import GroupMaker
from mars_rollout.render import PromptRenderer
from mars_shared.contracts import Decoding, Kind, PolicyVersion, Prompt, Purpose, Source, expected_members, sampling_seed
from mars_shared.errors import BlobMissingError, ImageError, MediaTypeError, NotReadyError, TooLargeError
from rollout_doubles import ScriptedEngine
from rollout_fixtures import DATA, RunFolder, adhoc, make_prompt, png


@pytest.fixture
def scripted() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def making(scripted: ScriptedEngine, renderer: PromptRenderer, run_folder: RunFolder) -> GroupMaker:
    return GroupMaker(scripted, renderer, run_folder.blobs, replica="r", data=DATA)


def sampled(prompt: Prompt, **changes: object) -> Prompt:
    return prompt.model_copy(update={"sampling": prompt.sampling.model_copy(update=changes)})


async def test_a_group_is_whole_ordered_and_seeded_by_the_contract(making: GroupMaker, run_folder: RunFolder) -> None:
    prompt = adhoc(make_prompt(run_folder.blobs))
    group = await making.make(prompt, pull_s=0.25)
    assert [(c.kind, c.source, c.index) for c in group.completions] == list(expected_members(prompt))
    for completion in group.completions:
        first = sampling_seed(11, "sample-1", 0, completion.kind, completion.source)
        assert completion.seed == first + completion.index
        assert completion.token_ids == (first + completion.index,)
    assert [view.source for view in group.views] == [None, "visible", "infrared"]
    assert group.views[0].token_ids.count(5) == 8
    assert group.pull_s == 0.25 and group.replica == "r"


async def test_all_views_are_sent_at_once_and_images_are_shared(
    making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder
) -> None:
    scripted.gate.clear()
    work = asyncio.create_task(making.make(adhoc(make_prompt(run_folder.blobs))))
    await scripted.until_running(3)
    multi, visible, infrared = scripted.requests
    assert [request.n for request in scripted.requests] == [4, 2, 2]
    assert multi.images[0] is visible.images[0] and multi.images[1] is infrared.images[0]
    scripted.gate.set()
    await work


async def test_greedy_members_have_no_seed(making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder) -> None:
    prompt = sampled(adhoc(make_prompt(run_folder.blobs)), mono_decoding=Decoding.GREEDY, num_mono=1)
    group = await making.make(prompt)
    assert [c.seed is None for c in group.completions] == [c.kind is Kind.MONO for c in group.completions]
    assert [request.greedy for request in scripted.requests] == [False, True, True]


async def test_training_goes_before_adhoc(making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder) -> None:
    await making.make(make_prompt(run_folder.blobs))
    await making.make(adhoc(make_prompt(run_folder.blobs)))
    assert [request.urgent for request in scripted.requests] == [True] * 3 + [False] * 3


async def test_probes_alone_carry_hashes_of_their_pixels(making: GroupMaker, run_folder: RunFolder) -> None:
    probe = await making.make(make_prompt(run_folder.blobs, purpose=Purpose.PROBE, policy_version=BASE_VERSION))
    assert [view.pixels for view in probe.views] == [("pixels of image 0", "pixels of image 1"), *[("pixels of image 0",)] * 2]
    training = await making.make(make_prompt(run_folder.blobs, policy_version=BASE_VERSION))
    assert [view.pixels for view in training.views] == [None] * 3


async def test_one_failing_view_cancels_the_others(making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder) -> None:
    scripted.gate.clear()
    scripted.failures.append(NotReadyError("dropped"))
    with pytest.raises(NotReadyError, match="dropped"):
        await making.make(make_prompt(run_folder.blobs))
    assert scripted.running == 0


async def test_a_training_group_of_two_versions_is_refused(
    making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder
) -> None:
    scripted.gate.clear()
    work = asyncio.create_task(making.make(make_prompt(run_folder.blobs)))
    await scripted.until_running(3)
    scripted.version = scripted.version.model_copy(update={"step": 9})
    scripted.gate.set()
    with pytest.raises(NotReadyError, match=r"task-1: weights changed from 0\.0 to \['0\.9'\]"):
        await work


@pytest.mark.parametrize(
    ("began", "ended", "strange"),
    [(3, 3, None), (3, 5, None), (4, 5, None), (2, 2, "1.2"), (2, 3, "1.2"), (5, 6, "1.6")],
)
async def test_every_token_of_a_group_is_by_a_version_that_it_tolerates(
    making: GroupMaker, scripted: ScriptedEngine, run_folder: RunFolder, began: int, ended: int, strange: str | None
) -> None:
    """Version 1.3 with max_staleness 2: 1.3, 1.4 and 1.5 may answer."""
    scripted.gate.clear()
    scripted.version = PolicyVersion(incarnation=1, step=began)
    prompt = make_prompt(run_folder.blobs, policy_version=PolicyVersion(incarnation=1, step=3), max_staleness=2)
    work = asyncio.create_task(making.make(prompt))
    await scripted.until_running(3)
    scripted.version = PolicyVersion(incarnation=1, step=ended)
    scripted.gate.set()
    if strange is not None:
        with pytest.raises(NotReadyError, match=rf"weights changed from 1\.{began} to \['{strange}'\]"):
            await work
        return
    group = await work
    assert group.policy_version.step == began
    assert {tuple(span.version.step for span in c.spans) for c in group.completions} == {tuple(sorted({began, ended}))}


def with_blob(run_folder: RunFolder, data: bytes, media_type: str = "image/png") -> Prompt:
    prompt = make_prompt(run_folder.blobs)
    source = Source.model_validate({"name": "visible", "blob": run_folder.blobs.put(data), "media_type": media_type})
    return prompt.model_copy(update={"sources": (source, prompt.sources[1])})


@pytest.mark.parametrize(
    ("data", "media_type", "error", "message"),
    [
        (png(0)[:2000], "image/png", ImageError, "cannot be decoded"),
        (png(0, 1, 1), "image/png", ImageError, "1 x 1 pixels"),
        (png(0, 1, 300), "image/png", ImageError, "1 x 300 pixels"),
        (png(0, 600, 600), "image/png", TooLargeError, "600 x 600 pixels"),
        (png(0), "image/jpeg", MediaTypeError, "declared as image/jpeg, but its bytes are image/png"),
        (b"GIF89a", "image/png", MediaTypeError, "not an image we read"),
    ],
)
async def test_a_bad_image_is_refused_by_prompt_and_source(
    data: bytes, media_type: str, error: type[Exception], message: str, making: GroupMaker, run_folder: RunFolder
) -> None:
    with pytest.raises(error, match=f"prompt sample-1, source 'visible': .*{message}|{message}"):
        await making.make(with_blob(run_folder, data, media_type))


async def test_a_missing_blob_is_named(making: GroupMaker, run_folder: RunFolder) -> None:
    prompt = make_prompt(run_folder.blobs)
    source = prompt.sources[1].model_copy(update={"blob": "0" * 64})
    with pytest.raises(BlobMissingError, match="prompt sample-1, source 'infrared': blob 000"):
        await making.make(prompt.model_copy(update={"sources": (prompt.sources[0], source)}))
