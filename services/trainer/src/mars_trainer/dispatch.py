"""Which sample comes next, and the prompt that asks for it.

A dispatch index names a place in the endless, seeded order of the training samples; the same
index always names the same sample, seeds and task id, so work can be issued again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mars_shared.blobs import BlobStore
from mars_shared.contracts import PolicyVersion, Prompt, Purpose, SamplingSpec, Source
from mars_shared.frames import resolved_box_frame
from mars_shared.images import media_type_of
from mars_shared.settings import Recipe
from mars_trainer.datasets.base import Sample


@dataclass(frozen=True)
class Place:
    """Where a dispatch index falls: the row of the training set in an epoch's shuffled order."""

    epoch: int
    row: int


def place_of(dispatch_index: int, *, rows: int, seed: int) -> Place:
    """Every epoch visits each of the `rows` samples once, in an order of its own.

    Raises:
        ValueError: the training set is empty.
    """
    if rows < 1:
        raise ValueError("the training set is empty; expected at least one sample")
    epoch, position = divmod(dispatch_index, rows)
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return Place(epoch=epoch, row=int(order[position]))


class PromptMaker:
    """Turns samples into prompts, with their images in the blob store."""

    def __init__(self, recipe: Recipe, blobs: BlobStore) -> None:
        """Raises ConfigError: the frame in which the model writes boxes is unknown."""
        self._recipe = recipe
        self._box_frame = resolved_box_frame(recipe.model)
        self._blobs = blobs

    def training(self, sample: Sample, *, epoch: int, dispatch_index: int, version: PolicyVersion) -> Prompt:
        """The prompt of a training group."""
        spec = self._recipe.rollout.spec(self._recipe.run.seed)
        return self._prompt(sample, Purpose.TRAIN, _training_task(dispatch_index), spec, epoch, dispatch_index, version)

    def again(self, prompt: Prompt, *, dispatch_index: int, version: PolicyVersion) -> Prompt:
        """A training prompt that died before, as the prompt of another dispatch index; its images are where they were."""
        return prompt.model_copy(
            update={"task_id": _training_task(dispatch_index), "dispatch_index": dispatch_index, "policy_version": version}
        )

    def evaluation(self, sample: Sample, *, row: int, version: PolicyVersion) -> Prompt:
        """The prompt of an evaluation group: one greedy completion of each kind and source."""
        spec = self._recipe.rollout.greedy_spec(self._recipe.run.seed)
        return self._prompt(sample, Purpose.EVAL, f"eval-{version}-{row:08d}", spec, 0, row, version)

    def probe(self, sample: Sample, *, dispatch_index: int, version: PolicyVersion) -> Prompt:
        """The prompt of the self-test's group."""
        spec = self._recipe.rollout.probe_spec(self._recipe.run.seed, sources=len(sample.images))
        task_id = f"probe-{version}-{dispatch_index:08d}"
        return self._prompt(sample, Purpose.PROBE, task_id, spec, 0, dispatch_index, version)

    def _prompt(
        self,
        sample: Sample,
        purpose: Purpose,
        task_id: str,
        spec: SamplingSpec,
        epoch: int,
        dispatch_index: int,
        version: PolicyVersion,
    ) -> Prompt:
        sources = tuple(
            Source(name=name, blob=self._blobs.put(data), media_type=_media_type(sample, name, data))
            for name, data in sample.images.items()
        )
        return Prompt(
            task_id=task_id,
            prompt_id=sample.prompt_id,
            run=self._recipe.run.name,
            purpose=purpose,
            epoch=epoch,
            dispatch_index=dispatch_index,
            question=sample.question,
            sources=sources,
            truth=sample.truth,
            box_frame=self._box_frame,
            sampling=spec,
            policy_version=version,
            max_staleness=self._recipe.train.max_staleness if purpose is Purpose.TRAIN else 0,
        )


def _training_task(dispatch_index: int) -> str:
    return f"train-{dispatch_index:08d}"


def _media_type(sample: Sample, name: str, data: bytes) -> str:
    return media_type_of(data, what=f"{sample.label}, source {name!r}")
