"""Real training in one process: groups sampled from the policy itself, scored, and learned from.

Sampler, rewards, advantages, losses and optimizer are those of the project but for the engine, whose place the trainer's own
model takes. Two prompts of the digits task a step, with six completions of both sources and one of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import time

import torch
from transformers.utils import logging

from mars_reward.registry import score
from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    BoxFrame,
    Completion,
    FinishReason,
    FrameKind,
    Kind,
    PolicyVersion,
    Prompt,
    RenderedView,
    RolloutGroup,
    ScoredGroup,
    ScoreItem,
)
from mars_shared.messages import build_messages, images_shown
from mars_shared.settings import Recipe
from mars_trainer.batching import EncodedGroup, EncodedPrompt
from mars_trainer.credit import credit
from mars_trainer.datasets import load_dataset
from mars_trainer.datasets.base import Sample
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.imitation import encode_prompt
from mars_trainer.learner import Learner

FRAME = BoxFrame(kind=FrameKind.RESIZED, width=56, height=56)
"""Answers of the digits task hold no boxes."""


class Training:
    """A policy in training, step by step; `begin` it from another one's weights and moments to change the learning rate."""

    def __init__(self, recipe: Recipe, begin: Training | None = None) -> None:
        logging.disable_progress_bar()
        blobs = BlobStore(recipe.run.dir / "blobs")
        self._recipe = recipe
        self._prompts = PromptMaker(recipe, blobs)
        self._samples = load_dataset("digits").train
        self._next = 0
        self.learner = Learner(recipe, blobs)
        self.metrics: dict[str, float] = {}
        if begin is not None:
            other = begin.learner
            self.learner.restore(other.model_tensors(), other.optimizer_tensors(), steps_done=0)
            self._next = begin._next

    def step(self) -> None:
        """One step on groups of the policy as it is."""
        groups = [self._group() for _ in range(self._recipe.train.prompts_per_step)]
        credits = [credit(group, self._recipe.train, self._recipe.rollout.max_completion_length) for group in groups]
        rewards = [score.reward for group in groups for score in group.scores]
        self.metrics = self.learner.step(groups, credits) | {
            "reward": sum(rewards) / len(rewards),
            "signal": sum(credit.signal for credit in credits) / len(credits),
        }

    def _group(self) -> ScoredGroup:
        """The next prompt's completions with their rewards."""
        index, self._next = self._next, self._next + 1
        place = place_of(index, rows=len(self._samples), seed=self._recipe.run.seed)
        sample = self._samples[place.row]
        version = PolicyVersion(incarnation=1, step=0)
        prompt = self._prompts.training(sample, epoch=place.epoch, dispatch_index=index, version=version)
        views, completions = [], []
        for only in (None, *sample.images):
            view, encoded = self._render(sample, only)
            views.append(view)
            completions += self._complete(prompt, only, encoded)
        group = RolloutGroup(
            prompt=prompt,
            views=tuple(views),
            completions=tuple(completions),
            policy_version=version,
            weights_id="trainer",
            replica="trainer",
            started_at=time(),
            generation_s=0.0,
        )
        items = [ScoreItem(completion=member.text, truth=sample.truth) for member in completions]
        scores = tuple(score(item, self._recipe.reward.recipe) for item in items)
        return ScoredGroup(group=group, scores=scores, recipe=self._recipe.reward.recipe, scoring_started_at=0, reward_s=0)

    def _render(self, sample: Sample, only: str | None) -> tuple[RenderedView, EncodedPrompt]:
        names = tuple(sample.images)
        shown = images_shown(names, only=only)
        messages = build_messages(sample.question, names, only=only)
        encoded = encode_prompt(sample, messages, shown, self.learner.policy, self._recipe.data.max_image_pixels)
        return RenderedView(source=only, token_ids=encoded.token_ids, images=shown, frame=FRAME), encoded

    def _complete(self, prompt: Prompt, only: str | None, encoded: EncodedPrompt) -> list[Completion]:
        spec, tokenizer = prompt.sampling, self.learner.policy.processor.tokenizer
        sampled = self._sample(encoded, spec.num_generations if only is None else spec.num_mono)
        logprobs = self.learner.logprobs(EncodedGroup(encoded, tuple(sampled)))
        return [
            Completion(
                group_id=prompt.task_id,
                kind=Kind.MULTI if only is None else Kind.MONO,
                source=only,
                index=index,
                text=tokenizer.decode(ids, skip_special_tokens=True),
                token_ids=ids,
                logprobs=values,
                finish_reason=FinishReason.STOP if ids[-1] == tokenizer.eos_token_id else FinishReason.LENGTH,
                seed=None,
            )
            for index, (ids, values) in enumerate(zip(sampled, logprobs, strict=True))
        ]

    @torch.no_grad()
    def _sample(self, encoded: EncodedPrompt, count: int) -> list[tuple[int, ...]]:
        """Token ids of some completions, each up to its end token."""
        model, tokenizer = self.learner.model, self.learner.policy.processor.tokenizer
        prompt = torch.tensor([encoded.token_ids], device=self.learner.device)
        rows: Sequence[Sequence[int]] = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=(prompt == self.learner.policy.layout.image_token_id).int(),
            pixel_values=encoded.pixel_values.to(self.learner.device),
            image_grid_thw=encoded.grid_thw.to(self.learner.device),
            do_sample=True,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=self._recipe.rollout.max_completion_length,
        )[:, prompt.shape[1] :].tolist()
        return [_until_end(row, tokenizer.eos_token_id) for row in rows]


def _until_end(row: Sequence[int], end: int) -> tuple[int, ...]:
    return tuple(row[: row.index(end) + 1] if end in row else row)
