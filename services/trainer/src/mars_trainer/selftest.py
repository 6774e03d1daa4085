"""Sampler and trainer agree, or the run does not begin: one probe group is looked at from both sides.

Reading order: `SelfTest.run`, then `differences` in agreement.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from mars_shared.contracts import BoxFrame, FrameKind, PolicyVersion, Prompt, RenderedView, RolloutGroup
from mars_shared.errors import InputError, RewardError, SelfTestError
from mars_shared.frames import resolved_box_frame
from mars_shared.images import pixel_hash
from mars_shared.queue import DeadLetter
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog
from mars_trainer.agreement import Facts, ViewFacts, bounds_of, differences, logprob_differences
from mars_trainer.batching import EncodedPrompt, merged_patches
from mars_trainer.datasets import Sample
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.exchange import Death, Exchange
from mars_trainer.learner import Learner, members_of

SAMPLES_TRIED = 3
"""Training samples that may be unusable before the run is refused."""
UNUSABLE = {
    "InputError",
    *(kind.__name__ for kind in InputError.__subclasses__()),
    "bad input",
    RewardError.reason,
    *(kind.reason for kind in RewardError.__subclasses__()),
}
"""Reasons of dead letters that may lie in the sample alone."""
PER_MILLE = 1000


@dataclass
class SelfTest:
    """Asks one group and compares; nothing of it is trained on."""

    recipe: Recipe
    samples: Sequence[Sample]
    learner: Learner
    prompts: PromptMaker
    exchange: Exchange
    events: EventLog

    async def run(self, version: PolicyVersion) -> None:
        """Compare at a published version, and write the event `self_test`.

        Raises:
            SelfTestError: sampler and trainer differ, or no probe group could be made; names every difference.
        """
        began = time.time()
        await self.exchange.start()
        group = await self._probe(version)
        sampler = sampler_facts(group, self.learner.policy.layout.image_token_id)
        trainer = await asyncio.to_thread(trainer_facts, group, self.learner, self.recipe)
        found = differences(sampler, trainer, bounds_of(self.recipe, self.learner.device.type))
        if found:
            raise SelfTestError(_refusal(found, group.replica))
        compared = logprob_differences(sampler, trainer)
        self.events.write(
            "self_test",
            step=version.step,
            replica=group.replica,
            tokens=compared.tokens,
            image_tokens=sum(sum(facts.image_tokens) for facts in trainer.values()),
            logprob_difference_max=compared.maximum,
            logprob_difference_mean=compared.mean,
            seconds=time.time() - began,
        )

    async def _probe(self, version: PolicyVersion) -> RolloutGroup:
        """The group of the first training sample that can be used."""
        rows, reasons = len(self.samples), []
        for index in range(min(SAMPLES_TRIED, rows)):
            place = place_of(index, rows=rows, seed=self.recipe.run.seed)
            try:
                prompt = self.prompts.probe(self.samples[place.row], dispatch_index=index, version=version)
            except InputError as error:
                reasons.append(str(error))
                continue
            answer = await self._ask(prompt)
            if isinstance(answer, RolloutGroup):
                return answer
            reasons.append(f"{answer.reason}: {answer.detail}")
            if answer.reason not in UNUSABLE:
                break
        raise SelfTestError("self-test: no probe group could be made; remove the cause, then start again:" + _listed(reasons))

    async def _ask(self, prompt: Prompt) -> RolloutGroup | DeadLetter:
        letters: list[DeadLetter] = []

        def note(death: Death) -> None:
            dead, letter = death.prompt, death.letter
            letters.append(letter)
            self.events.write("dead", task_id=dead.task_id, prompt_id=dead.prompt_id, reason=f"{letter.reason}: {letter.detail}")

        answers = await self.exchange.gather([prompt], on_death=note)
        await self.exchange.acknowledge([answer.claim for answer in answers])
        return answers[0].scored.group if answers else letters[0]


def sampler_facts(group: RolloutGroup, image_token_id: int) -> Facts:
    """What the replica says."""
    return {
        view.source: ViewFacts(
            images=view.images,
            image_tokens=tuple(len(list(run)) for token, run in groupby(view.token_ids) if token == image_token_id),
            pixels=view.pixels or (),
            frame=view.frame,
            logprobs=tuple(completion.logprobs for completion in members_of(group, view)),
        )
        for view in group.views
    }


def trainer_facts(group: RolloutGroup, learner: Learner, recipe: Recipe) -> Facts:
    """What the trainer computes from the same images and token ids."""
    return {view.source: _trainer_view(group, view, learner, recipe) for view in group.views}


def _trainer_view(group: RolloutGroup, view: RenderedView, learner: Learner, recipe: Recipe) -> ViewFacts:
    encoded, layout = learner.encode(group, view), learner.policy.layout
    expected = tuple(merged_patches(encoded.prompt.grid_thw, layout))
    fits = sum(expected) == view.token_ids.count(layout.image_token_id)
    return ViewFacts(
        images=view.images,
        image_tokens=expected,
        pixels=tuple(_pixel_hashes(encoded.prompt, getattr(torch, recipe.model.dtype))),
        frame=_frame(group.prompt, view, encoded.prompt, learner, recipe),
        logprobs=learner.logprobs(encoded) if fits else None,
    )


def _pixel_hashes(prompt: EncodedPrompt, sampler_dtype: torch.dtype) -> Iterator[str]:
    patches = prompt.pixel_values.to(sampler_dtype).float().split(prompt.grid_thw.prod(dim=1).tolist())
    for values, grid in zip(patches, prompt.grid_thw, strict=True):
        yield pixel_hash(values.numpy().tobytes(), grid.tolist())


def _frame(prompt: Prompt, view: RenderedView, encoded: EncodedPrompt, learner: Learner, recipe: Recipe) -> BoxFrame:
    """From what the image processor made of the view's first image, where replicas foretell it from the image's size."""
    kind = resolved_box_frame(recipe.model)
    if kind is FrameKind.PER_MILLE:
        return BoxFrame(kind=kind, width=PER_MILLE, height=PER_MILLE)
    if kind is FrameKind.ORIGINAL:
        width, height = learner.images(prompt, view)[0].size
        return BoxFrame(kind=kind, width=width, height=height)
    patch_px = learner.policy.processor.image_processor.patch_size
    _, tall, wide = encoded.grid_thw[0].tolist()
    return BoxFrame(kind=kind, width=wide * patch_px, height=tall * patch_px)


def _refusal(found: list[str], replica: str) -> str:
    return (
        f"self-test: sampler ({replica}) and trainer disagree, so that training would go wrong unseen:{_listed(found)}\n"
        "Both sides need one model folder (weights, config, preprocessor_config) and the package versions of deploy/. If the "
        "difference is known and accepted, raise the bound that is named, or start with self_test.enabled = false"
    )


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  - {line}" for line in lines)
