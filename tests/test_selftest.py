"""A run begins only if sampler and trainer agree; each way to disagree is found alone and named.

The sampler at the exchange's seam is a double that tells the truth about a real tiny model, or one lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    BoxFrame,
    Completion,
    Decoding,
    FinishReason,
    FrameKind,
    PolicyVersion,
    Prompt,
    Purpose,
    RenderedView,
    RolloutGroup,
    expected_members,
)
from mars_shared.errors import ConfigError, SelfTestError
from mars_shared.images import open_image, pixel_hash
from mars_shared.queue import DeadLetter
from mars_shared.settings import load_recipe
from mars_shared.telemetry import EventLog, read_events
from mars_trainer.agreement import Bounds, ViewFacts, bounds_of, differences, logprob_differences
from mars_trainer.batching import expand_placeholders, pixels
from mars_trainer.checkpoint import Ledger
from mars_trainer.datasets import RunData, load_dataset
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.exchange import Death
from mars_trainer.group_log import GroupLog
from mars_trainer.learner import Learner
from mars_trainer.loop import TrainingRun
from mars_trainer.progress import Progress
from mars_trainer.selftest import SelfTest
from mars_trainer.tiny import write_tiny

RECIPE = """
[run]
name = "test"
dir = "{dir}"
[model]
path = "{dir}/model"
dtype = "float32"
max_model_len = 256
[data]
dataset = "digits"
[rollout]
num_generations = 4
num_mono = 1
mono_decoding = "greedy"
temperature = 0.7
top_p = 0.9
max_completion_length = 64
[train]
steps = 3
prompts_per_step = 3
learning_rate = 1e-3
threads = 1
"""
BOUNDS = Bounds(maximum=1e-3, mean=1e-4)
VERSION = PolicyVersion(incarnation=2, step=0)
FRAME = BoxFrame(kind=FrameKind.RESIZED, width=56, height=56)
ANSWER = (20, 30, 2)
Lie = Callable[[RolloutGroup], RolloutGroup]

VIEW = ViewFacts(
    images=("visible", "infrared"),
    image_tokens=(4, 4),
    pixels=("aaaa", "bbbb"),
    frame=FRAME,
    logprobs=((-1.0, -2.0), (-0.5,)),
)
FACTS = {None: VIEW, "visible": replace(VIEW, images=("visible",), image_tokens=(4,), pixels=("aaaa",), logprobs=((-3.0,),))}


def test_equal_facts_differ_in_nothing() -> None:
    assert differences(FACTS, FACTS, BOUNDS) == []
    # (-1.0004 and -1.0) is within the largest difference, and 0.0004 / 4 tokens within the mean.
    near = FACTS | {None: replace(VIEW, logprobs=((-1.0004, -2.0), (-0.5,)))}
    assert differences(near, FACTS, Bounds(maximum=5e-4, mean=1.1e-4)) == []
    compared = logprob_differences(near, FACTS)
    assert (compared.tokens, compared.maximum, compared.mean) == (4, pytest.approx(4e-4), pytest.approx(1e-4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"logprobs": ((-1.0, -2.0), (-0.51,))}, ["completion 1", "token 0", "-0.510000", "-0.500000", "bound 0.001"]),
        ({"logprobs": ((-1.0, math.nan), (-0.5,))}, ["completion 0", "token 1", "nan", "-2.000000"]),
        ({"image_tokens": (4, 5)}, ["visible, infrared", "(4, 5)", "(4, 4)"]),
        ({"pixels": ("aaaa", "cccc")}, ["'infrared'", "cccc", "bbbb"]),
        ({"pixels": ()}, ["sampler 0", "trainer 2"]),
        ({"frame": BoxFrame(kind=FrameKind.RESIZED, width=84, height=56)}, ["resized 84 x 56", "resized 56 x 56"]),
        ({"frame": BoxFrame(kind=FrameKind.ORIGINAL, width=56, height=56)}, ["original 56 x 56", "resized 56 x 56"]),
    ],
)
@pytest.mark.parametrize("liar", ["sampler", "trainer"])
def test_each_difference_is_one_line_with_both_values(changes: dict[str, Any], named: list[str], liar: str) -> None:
    lie = FACTS | {None: replace(VIEW, **changes)}
    sides = (lie, FACTS) if liar == "sampler" else (FACTS, lie)
    (line,) = [line for line in differences(*sides, BOUNDS) if line.startswith("view of all sources")]
    for text in named if liar == "sampler" else ():
        assert text in line, line


def test_many_small_differences_are_found_by_their_mean() -> None:
    # Each token is 0.0009 off: within the largest difference, nine times over the mean.
    off = {
        source: replace(v, logprobs=tuple(tuple(x - 9e-4 for x in row) for row in v.logprobs or ()))
        for source, v in FACTS.items()
    }
    (line,) = differences(off, FACTS, BOUNDS)
    assert "4 tokens: mean difference 0.0009; bound 0.0001 (self_test.mean_logprob_difference)" in line


def test_every_difference_is_listed() -> None:
    lie = FACTS | {
        None: replace(VIEW, pixels=("x", "y"), image_tokens=(1, 1)),
        "visible": replace(FACTS["visible"], frame=BoxFrame(kind=FrameKind.RESIZED, width=28, height=28)),
    }
    lines = differences(lie, FACTS, BOUNDS)
    assert [line.split(":")[0] for line in lines] == ["view of all sources"] * 3 + ["view of source 'visible'"]


def test_a_pixel_hash_is_of_values_and_grid() -> None:
    values = np.arange(8, dtype=np.float32)
    first = pixel_hash(values.tobytes(), (1, 2, 4))
    assert first == pixel_hash(values.copy().tobytes(), [1, 2, 4]) and len(first) == 64
    assert len({first, pixel_hash(values.tobytes(), (1, 4, 2)), pixel_hash((values + 1e-6).tobytes(), (1, 2, 4))}) == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selftest")
    write_tiny(folder / "model", seed=1)
    (folder / "recipe.toml").write_text(RECIPE.format(dir=folder))
    return folder


@pytest.fixture(scope="module")
def learner(place: Path) -> Learner:
    return Learner(load_recipe(place / "recipe.toml"), BlobStore(place / "blobs"))


class Sampler:
    """An exchange that answers with the learner's own numbers, changed by `lie`; the first `dead` prompts die of `reason`."""

    def __init__(
        self, learner: Learner, blobs: BlobStore, lie: Lie = lambda group: group, *, dead: int = 0, reason: str = ""
    ) -> None:
        self.learner, self.blobs, self.lie, self.dead, self.reason = learner, blobs, lie, dead, reason
        self.asked: list[Prompt] = []

    async def start(self) -> None:
        pass

    async def acknowledge(self, claims: Iterable[Any]) -> None:
        pass

    async def gather(self, prompts: Iterable[Prompt], *, on_death: Callable[[Death], None]) -> list[Any]:
        (prompt,) = prompts
        self.asked.append(prompt)
        if len(self.asked) <= self.dead:
            letter = DeadLetter("1", b"", "key", self.reason, "it is torn", stream="prompts", attempt=1, time_s=0.0)
            on_death(Death(prompt, letter))
            return []
        return [SimpleNamespace(claim=None, scored=SimpleNamespace(group=self.lie(self._true_group(prompt))))]

    def _true_group(self, prompt: Prompt) -> RolloutGroup:
        names = [source.name for source in prompt.sources]
        views = [self._view(prompt, shown) for shown in (names, *([name] for name in names))]
        group = RolloutGroup(
            prompt=prompt,
            views=tuple(view.model_copy(update={"source": source}) for view, source in zip(views, (None, *names), strict=True)),
            completions=tuple(_completion(prompt, *member) for member in expected_members(prompt)),
            policy_version=VERSION,
            weights_id="w",
            replica="replica-0",
            started_at=0,
            generation_s=0,
        )
        logprobs = [row for view in group.views for row in self.learner.logprobs(self.learner.encode(group, view))]
        told = tuple(c.model_copy(update={"logprobs": row}) for c, row in zip(group.completions, logprobs, strict=True))
        return group.model_copy(update={"completions": told})

    def _view(self, prompt: Prompt, shown: list[str]) -> RenderedView:
        blobs, policy = {source.name: source.blob for source in prompt.sources}, self.learner.policy
        images = [open_image(self.blobs.get(blobs[name]), what=name, max_pixels=10**6) for name in shown]
        values, grid = pixels(policy.processor, images)
        per_image = np.split(values.numpy(), len(shown))
        return RenderedView(
            source=None,
            token_ids=expand_placeholders(
                [10, *(t for _ in shown for t in (policy.layout.image_token_id, 11)), 12], grid, policy.layout
            ),
            images=tuple(shown),
            frame=FRAME,
            pixels=tuple(pixel_hash(v.tobytes(), g.tolist()) for v, g in zip(per_image, grid, strict=True)),
        )


def _completion(prompt: Prompt, kind: Any, source: str | None, index: int) -> Completion:
    return Completion(
        group_id=prompt.task_id,
        kind=kind,
        source=source,
        index=index,
        text="7",
        token_ids=ANSWER,
        logprobs=(0.0,) * len(ANSWER),
        finish_reason=FinishReason.STOP,
        seed=index,
    )


class Untouched:
    """Stands for what must not be reached once the self-test failed."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was reached")


class Quiet:
    """An exchange and a publisher that may be started and published through, and nothing else."""

    async def start(self, dispatched: Sequence[Prompt] = (), **_: Any) -> list[Prompt]:
        return []

    def ask(self, prompts: Iterable[Prompt]) -> None:
        assert not list(prompts)

    def encode(self, model: object, version: PolicyVersion) -> None:
        pass

    def announce(self) -> None:
        pass

    def upload(self) -> None:
        pass

    def needs_snapshot(self) -> bool:
        return False

    def needs_upload(self) -> bool:
        return False


def make_run(place: Path, learner: Learner, sampler: Sampler, folder: Path) -> TrainingRun:
    recipe, blobs = load_recipe(place / "recipe.toml"), sampler.blobs
    events, prompts, samples = EventLog(folder / "events.jsonl"), PromptMaker(recipe, blobs), load_dataset("digits").train
    return TrainingRun(
        recipe=recipe,
        data=RunData(samples, {}),
        evaluations=folder / "evaluations",
        learner=learner,
        prompts=prompts,
        training=cast(Any, Quiet()),
        evaluation=cast(Any, Quiet()),
        publisher=cast(Any, Quiet()),
        checkpoints=cast(Any, Untouched()),
        events=events,
        groups=GroupLog(folder / "groups"),
        ledger=Ledger(run="test", model="m", version=VERSION, next_dispatch_index=0, consumed=()),
        progress=Progress(run="test", steps=3, version=VERSION),
        self_test=SelfTest(recipe, samples, learner, prompts, cast(Any, sampler), events),
    )


@pytest.fixture
def blobs(place: Path) -> BlobStore:
    return BlobStore(place / "blobs")


def changed_view(changes: dict[str, Any]) -> Lie:
    return lambda group: group.model_copy(update={"views": (*group.views[:-1], group.views[-1].model_copy(update=changes))})


def other_logprob(group: RolloutGroup) -> RolloutGroup:
    last = group.completions[-1]
    lie = last.model_copy(update={"logprobs": (*last.logprobs[:-1], last.logprobs[-1] - 0.01)})
    return group.model_copy(update={"completions": (*group.completions[:-1], lie)})


def one_image_token_more(group: RolloutGroup) -> RolloutGroup:
    ids = group.views[-1].token_ids
    return changed_view({"token_ids": (*ids[:2], ids[1], *ids[2:])})(group)


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (other_logprob, r"view of source 'infrared', completion 0: log-probabilities of 1 of 3 tokens.*token 2.*max_logprob"),
        (one_image_token_more, r"view of source 'infrared': tokens of images infrared: sampler \(5,\), trainer \(4,\)"),
        (changed_view({"pixels": ("0" * 64,)}), r"pixels of image 'infrared': sampler 0000000000000000, trainer [0-9a-f]{16};"),
        (changed_view({"pixels": None}), "pixel hashes: sampler 0, trainer 1"),
        (changed_view({"frame": FRAME.model_copy(update={"width": 84.0})}), "sampler resized 84 x 56, trainer resized 56 x 56"),
    ],
)
async def test_a_lying_sampler_stops_the_run_before_anything_is_trained_or_kept(
    place: Path, learner: Learner, blobs: BlobStore, tmp_path: Path, lie: Lie, named: str
) -> None:
    before = learner.weights_hash()
    run = make_run(place, learner, Sampler(learner, blobs, lie), tmp_path)
    with pytest.raises(SelfTestError, match=named) as caught:
        await run.run()
    assert caught.value.exit_code == ConfigError.exit_code == 2
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")] == ["started"]
    assert run.ledger.next_dispatch_index == run.progress.next_dispatch_index == 0
    assert learner.weights_hash() == before


async def test_a_truthful_sampler_passes_and_the_event_has_the_numbers(
    place: Path, learner: Learner, blobs: BlobStore, tmp_path: Path
) -> None:
    sampler = Sampler(learner, blobs)
    test = make_run(place, learner, sampler, tmp_path).self_test
    assert test is not None
    await test.run(VERSION)
    (event,) = read_events(tmp_path / "events.jsonl", "self_test")
    # Two completions with both images and one of each image, 3 tokens each; four images of 2 x 2 merged patches are shown.
    assert (event["tokens"], event["image_tokens"], event["step"], event["replica"]) == (12, 16, 0, "replica-0")
    assert event["logprob_difference_max"] == event["logprob_difference_mean"] == 0


async def test_the_probe_is_the_first_training_sample_short_and_sampled_from_the_whole_vocabulary(
    place: Path, learner: Learner, blobs: BlobStore, tmp_path: Path
) -> None:
    sampler = Sampler(learner, blobs)
    run = make_run(place, learner, sampler, tmp_path)
    assert run.self_test is not None
    await run.self_test.run(VERSION)
    (prompt,) = sampler.asked
    first = run.data.train[place_of(0, rows=len(run.data.train), seed=0).row]
    assert (prompt.purpose, prompt.prompt_id, prompt.policy_version) == (Purpose.PROBE, first.prompt_id, VERSION)
    spec = prompt.sampling
    assert (spec.num_generations, spec.num_mono, spec.top_p, spec.temperature) == (2, 1, 1.0, 0.7)
    assert (spec.mono_decoding, spec.multi_decoding, spec.max_completion_length) == (Decoding.SAMPLE, Decoding.SAMPLE, 32)
    assert run.recipe.rollout.probe_spec(0, sources=1).num_mono == 0


async def test_a_sample_that_cannot_be_used_gives_way_to_the_next(
    place: Path, learner: Learner, blobs: BlobStore, tmp_path: Path
) -> None:
    sampler = Sampler(learner, blobs, dead=2, reason="ImageError")
    test = make_run(place, learner, sampler, tmp_path).self_test
    assert test is not None
    await test.run(VERSION)
    assert [prompt.dispatch_index for prompt in sampler.asked] == [0, 1, 2]
    assert len(read_events(tmp_path / "events.jsonl", "dead")) == 2
    assert len(read_events(tmp_path / "events.jsonl", "self_test")) == 1


@pytest.mark.parametrize(("reason", "asked"), [("ImageError", 3), ("replica died", 1)])
async def test_without_any_probe_group_the_run_refuses_with_the_reason(
    place: Path, learner: Learner, blobs: BlobStore, tmp_path: Path, reason: str, asked: int
) -> None:
    sampler = Sampler(learner, blobs, dead=99, reason=reason)
    with pytest.raises(SelfTestError, match=f"{reason}: it is torn"):
        await make_run(place, learner, sampler, tmp_path).run()
    assert len(sampler.asked) == asked


def test_bounds_are_those_of_the_dtype_unless_the_recipe_says_otherwise(place: Path) -> None:
    recipe = load_recipe(place / "recipe.toml")
    assert bounds_of(recipe, "cpu") == Bounds(maximum=1e-3, mean=1e-4)
    assert bounds_of(recipe, "cuda") == Bounds(maximum=0.05, mean=0.01)
    bfloat16 = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    assert bounds_of(bfloat16, "cuda") == Bounds(maximum=1.0, mean=0.05)
    chosen = recipe.self_test.model_copy(update={"max_logprob_difference": 0.5, "mean_logprob_difference": 0.25})
    assert bounds_of(recipe.model_copy(update={"self_test": chosen}), "cpu") == Bounds(maximum=0.5, mean=0.25)
