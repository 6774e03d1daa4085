"""One optimizer step from scored groups: advantages, microbatches, loss, AdamW on fp32 masters."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from blake3 import blake3
from PIL import Image
from torch import Tensor

from mars_shared.blobs import BlobStore
from mars_shared.contracts import Completion, Prompt, RenderedView, RolloutGroup, ScoredGroup
from mars_shared.errors import CheckpointError, DivergedError
from mars_shared.images import open_image
from mars_shared.settings import Recipe
from mars_trainer.algorithm.losses import importance_weights, loss_weights, policy_loss
from mars_trainer.batching import EncodedGroup, EncodedPrompt, Microbatch, make_microbatches, pixels
from mars_trainer.credit import Credit
from mars_trainer.model import TokenStatistics, completion_statistics, load_policy

RNG = "rng"


@dataclass(frozen=True)
class _Part:
    """A microbatch with what the loss needs of it, on the model's device; rows as in the microbatch."""

    batch: Microbatch
    advantages_B: Tensor
    mask_BT: Tensor
    """Completion tokens that enter the loss."""
    sampler_logprobs_BT: Tensor
    old_logprobs_BT: Tensor | None
    ref_logprobs_BT: Tensor | None


class Learner:
    """The trained policy and its optimizer.

    Raises:
        ConfigError, CheckpointError: the recipe's model folder cannot be used.
    """

    def __init__(self, recipe: Recipe, blobs: BlobStore) -> None:
        self._recipe = recipe
        self._train = recipe.train
        self._blobs = blobs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(recipe.train.threads)
            torch.use_deterministic_algorithms(True)
        self.policy = load_policy(recipe.model.path, torch.float32, self.device)
        self._reference = load_policy(recipe.model.path, torch.float32, self.device).model if recipe.train.beta > 0 else None
        self.model = self.policy.model
        self.model.eval()  # no dropout: log-probabilities must be the sampler's
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.train.learning_rate,
            betas=recipe.train.adam_betas,
            weight_decay=recipe.train.weight_decay,
        )
        self._steps_done = 0
        self.before_update: Callable[[], None] = lambda: None
        """Called before the parameters change: somebody may still read them."""

    def step(self, groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> dict[str, float]:
        """Train on a batch of groups; mono-source completions are in the credits and nowhere else.

        Returns:
            the step's numbers by metric name
        """
        learning_rate = self._set_learning_rate()
        totals: defaultdict[str, float] = defaultdict(float)
        minibatches = self._minibatches(groups, credits)
        if len(minibatches) > 1:
            minibatches = [[self._with_old_logprobs(part) for part in parts] for parts in minibatches]
        for parts in minibatches:
            self._update(parts, totals)
        self._steps_done += 1
        return _metrics(totals, updates=len(minibatches), learning_rate=learning_rate)

    def skip(self) -> None:
        """A step without groups: only the learning rate's schedule goes on."""
        self._steps_done += 1

    def _set_learning_rate(self) -> float:
        train, done = self._train, self._steps_done
        factor = min(1.0, (done + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        if train.lr_schedule == "linear":
            factor *= max(0.0, 1 - done / train.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = train.learning_rate * factor
        return train.learning_rate * factor

    def _minibatches(self, groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> list[list[_Part]]:
        size = self._train.minibatch_prompts or max(len(groups), 1)
        return [
            list(self._parts(groups[start : start + size], credits[start : start + size]))
            for start in range(0, len(groups), size)
        ]

    def _parts(self, groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> Any:
        completions = [members_of(scored.group, scored.group.view_of(None)) for scored in groups]
        encoded = [self.encode(scored.group, scored.group.view_of(None)) for scored in groups]
        for batch in make_microbatches(encoded, self.policy.layout, self._train.tokens_per_microbatch):
            batch = batch.to(self.device)
            yield _Part(
                batch=batch,
                advantages_B=torch.tensor([credits[g].advantages.advantages_G[i] for g, i in batch.rows], device=self.device),
                mask_BT=batch.completion_mask
                * torch.tensor([[credits[g].trained_G[i]] for g, i in batch.rows], device=self.device),
                sampler_logprobs_BT=_padded([completions[g][i].logprobs for g, i in batch.rows], batch.completion_mask),
                old_logprobs_BT=None,
                ref_logprobs_BT=self._frozen_logprobs(self._reference, batch) if self._reference else None,
            )

    def images(self, prompt: Prompt, view: RenderedView) -> list[Image.Image]:
        """A view's images in placeholder order.

        Raises:
            BlobMissingError, ImageError: one is missing or cannot be read.
        """
        blobs = {source.name: source.blob for source in prompt.sources}
        return [
            open_image(
                self._blobs.get(blobs[name]),
                what=f"prompt {prompt.task_id}, source {name!r}",
                max_pixels=self._recipe.data.max_image_pixels,
            )
            for name in view.images
        ]

    def encode(self, group: RolloutGroup, view: RenderedView) -> EncodedGroup:
        """A view with its completions; raises as `images`."""
        pixel_values, grid_thw = pixels(self.policy.processor, self.images(group.prompt, view))
        encoded = EncodedPrompt(group.group_id, view.token_ids, pixel_values, grid_thw)
        return EncodedGroup(encoded, tuple(completion.token_ids for completion in members_of(group, view)))

    def logprobs(self, group: EncodedGroup) -> tuple[tuple[float, ...], ...]:
        """Of every token of every completion, by the policy as it is.

        Raises:
            InputError: the prompt's placeholders don't match its images.
        """
        found: dict[int, tuple[float, ...]] = {}
        for batch in make_microbatches([group], self.policy.layout, self._train.tokens_per_microbatch):
            batch = batch.to(self.device)
            logprobs_BT = self._frozen_logprobs(self.model, batch)
            for (_, member), values, mask in zip(batch.rows, logprobs_BT, batch.completion_mask, strict=True):
                found[member] = tuple(values[mask].tolist())
        return tuple(values for _, values in sorted(found.items()))

    @torch.no_grad()
    def _frozen_logprobs(self, model: Any, batch: Microbatch) -> Tensor:
        return self._statistics(model, batch).logprobs

    def _with_old_logprobs(self, part: _Part) -> _Part:
        old = self._frozen_logprobs(self.model, part.batch)
        return replace(part, old_logprobs_BT=old)

    def _statistics(self, model: Any, batch: Microbatch) -> TokenStatistics:
        bf16 = self.device.type == "cuda" and self._recipe.model.dtype == "bfloat16"
        with torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext():
            return completion_statistics(model, batch, self._recipe.rollout.temperature, self._train.logprob_chunk_tokens)

    def _update(self, parts: Sequence[_Part], totals: dict[str, float]) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        batch_tokens = sum(int(part.mask_BT.sum()) for part in parts)
        batch_completions = sum(len(part.batch.rows) for part in parts)
        for part in parts:
            statistics = self._statistics(self.model, part.batch)
            mask = part.mask_BT.float()
            weights = loss_weights(
                mask,
                self._train.loss_type,
                batch_completions=batch_completions,
                batch_tokens=batch_tokens,
                max_completion_length=self._recipe.rollout.max_completion_length,
            )
            old = statistics.logprobs.detach() if part.old_logprobs_BT is None else part.old_logprobs_BT
            result = policy_loss(
                statistics.logprobs,
                old,
                part.advantages_B,
                mask,
                weights,
                epsilon=self._train.epsilon,
                epsilon_high=self._train.epsilon_high,
                dual_clip=self._train.dual_clip,
                importance_BT=importance_weights(
                    old, part.sampler_logprobs_BT, mask, self._train.importance_correction, cap=self._train.importance_cap
                ),
                ref_logprobs_BT=part.ref_logprobs_BT,
                beta=self._train.beta,
            )
            result.loss.backward()
            difference = ((old - part.sampler_logprobs_BT) * mask).abs()
            totals["sampler_difference_max"] = max(totals["sampler_difference_max"], difference.max().item())
            for name, value in {
                "loss": result.loss.detach(),
                "kl": result.kl_sum,
                "clip_low": result.clipped_low_sum,
                "clip_high": result.clipped_high_sum,
                "clip_dual": result.clipped_dual_sum,
                "entropy": (statistics.entropy * mask).sum(),
                "sampler_difference": difference.sum(),
                "tokens": mask.sum(),
            }.items():
                totals[name] += value.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._train.max_grad_norm)
        if not (torch.isfinite(norm) and math.isfinite(totals["loss"])):
            raise DivergedError(
                f"step {self._steps_done + 1}: gradient norm {norm.item()}, loss {totals['loss']}; expected finite numbers. "
                "The weights are as before the step; lower train.learning_rate or go on from an older checkpoint"
            )
        totals["grad_norm"] += norm.item()
        self.before_update()
        self._optimizer.step()

    def model_tensors(self) -> dict[str, Tensor]:
        """The fp32 master weights by name."""
        return {name: parameter.detach().cpu().contiguous() for name, parameter in self.model.named_parameters()}

    def weights_hash(self) -> str:
        """blake3 over the master weights, name by name: equal exactly when all bits are."""
        hasher = blake3()
        for name, tensor in sorted(self.model_tensors().items()):
            hasher.update(name.encode() + tensor.numpy().tobytes())
        return hasher.hexdigest()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state by "parameter/key", and the random generator's."""
        tensors = {RNG: torch.get_rng_state()}
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
        return tensors

    def restore(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], steps_done: int) -> None:
        """Go on from a checkpoint's tensors.

        Raises:
            CheckpointError: names or shapes are not this model's.
        """
        own = dict(self.model.named_parameters())
        if own.keys() != model.keys():
            raise CheckpointError(f"checkpoint has other parameters, e.g. {sorted(own.keys() ^ model.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != model[name].shape:
                    raise CheckpointError(f"checkpoint's {name} is {tuple(model[name].shape)}; expected {tuple(parameter.shape)}")
                parameter.copy_(model[name])
        for name, parameter in own.items():
            keys = [key for key in optimizer if key.rpartition("/")[0] == name]
            if keys:
                self._optimizer.state[parameter] = {
                    key.rpartition("/")[2]: optimizer[key].clone()
                    if key.endswith("/step")
                    else optimizer[key].to(parameter.device, copy=True)
                    for key in keys
                }
        torch.set_rng_state(optimizer[RNG])
        self._steps_done = steps_done


def members_of(group: RolloutGroup, view: RenderedView) -> list[Completion]:
    """The completions that saw a view."""
    return [completion for completion in group.completions if completion.source == view.source]


def _padded(rows: Sequence[Sequence[float]], mask_BT: Tensor) -> Tensor:
    padded = torch.zeros(mask_BT.shape, dtype=torch.float32)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
    return padded.to(mask_BT.device)


def _metrics(totals: dict[str, float], *, updates: int, learning_rate: float) -> dict[str, float]:
    tokens = max(totals["tokens"], 1)
    return {
        "loss": totals["loss"] / max(updates, 1),
        "kl": totals["kl"] / tokens,
        "entropy": totals["entropy"] / tokens,
        "clip_ratio/low": totals["clip_low"] / tokens,
        "clip_ratio/high": totals["clip_high"] / tokens,
        "clip_ratio/dual": totals["clip_dual"] / tokens,
        "grad_norm": totals["grad_norm"] / max(updates, 1),
        "learning_rate": learning_rate,
        "sampler/logprob_difference_mean": totals["sampler_difference"] / tokens,
        "sampler/logprob_difference_max": totals["sampler_difference_max"],
        "tokens": totals["tokens"],
    }
