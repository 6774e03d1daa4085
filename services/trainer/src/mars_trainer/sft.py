"""Supervised fine-tuning of a recipe's model on its training samples: the warm start before reinforcement.

Every sample is shown with all its sources, rendered as a replica renders it, and the model imitates one completion: the
answer alone, or a chain of thought and the answer. The loss is the cross-entropy of the completion's tokens and the end token.

    python -m mars_trainer.sft recipes/digits.toml --out models/digits-sft --target think
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from mars_shared.bars import progress
from mars_shared.contracts import FrameKind
from mars_shared.errors import DivergedError, InputError, MarsError, TooLongError
from mars_shared.frames import resolved_box_frame
from mars_shared.messages import build_messages
from mars_shared.settings import Recipe, load_recipe
from mars_trainer.batching import EncodedGroup, Microbatch, make_microbatches
from mars_trainer.datasets import Sample, open_data
from mars_trainer.dispatch import place_of
from mars_trainer.imitation import completion_ids, completion_text, encode_prompt, frame_size, refuse_markup
from mars_trainer.model import Policy, completion_logprobs, load_policy
from mars_trainer.model_writer import refuse_to_overwrite, write_model

Target = Literal["answer", "think"]
REPORT_EVERY_STEPS = 10


def sft(recipe: Recipe, out: Path, report: Callable[[str], None], target: Target | None = None) -> Path:
    """Fine-tune the recipe's model and write it to a folder that can be another recipe's `model.path`.

    Args:
        out: must not exist yet, or be empty.
        report: gets a line of progress now and then.
        target: what is imitated, in place of the recipe's `sft.target`.

    Raises:
        ConfigError: the folder holds something, or the recipe's model cannot be used.
        InputError: a sample cannot be demonstrated; names it.
        DivergedError: the loss or a gradient is no finite number.
    """
    refuse_to_overwrite(out, recipe.model.path)
    chosen: Target = target or recipe.sft.target
    tuning = FineTuning(recipe, chosen)
    loss = tuning.run(open_data(recipe.data.model_copy(update={"max_faulty_share": 0.0})).train, report)
    facts = {"recipe": recipe.run.name, "target": chosen, "steps": recipe.sft.steps, "loss": loss}
    write_model(tuning.policy.model, recipe.model.path, out, getattr(torch, recipe.model.dtype), {"sft.json": json.dumps(facts)})
    return out


class FineTuning:
    """A model in fp32, its optimizer, and the demonstrations that it is shown.

    Raises:
        ConfigError, CheckpointError: the recipe's model folder cannot be used.
    """

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self._recipe, self._target = recipe, target
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(recipe.train.threads)
            torch.use_deterministic_algorithms(True)
        self._frame: FrameKind = resolved_box_frame(recipe.model)
        self.policy: Policy = load_policy(recipe.model.path, torch.float32, self._device)
        self.policy.model.eval()  # no dropout, as in the steps of reinforcement
        self._optimizer = torch.optim.AdamW(
            self.policy.model.parameters(), betas=recipe.train.adam_betas, weight_decay=recipe.train.weight_decay
        )

    def run(self, samples: Sequence[Sample], report: Callable[[str], None]) -> float:
        """Train for the recipe's steps on `samples` in the run's seeded order; returns the last step's loss."""
        settings, started, loss = self._recipe.sft, time.monotonic(), math.nan
        with progress("sft", "step", settings.steps) as advance:
            for step in range(1, settings.steps + 1):
                first = (step - 1) * settings.samples_per_step
                places = range(first, first + settings.samples_per_step)
                rows = [place_of(index, rows=len(samples), seed=self._recipe.run.seed).row for index in places]
                loss = self.step([samples[row] for row in rows], step)
                advance(step)
                if step == 1 or step % REPORT_EVERY_STEPS == 0 or step == settings.steps:
                    report(f"sft: step {step} of {settings.steps}, loss {loss:.4f}, {time.monotonic() - started:.0f} s")
        return loss

    def step(self, samples: Sequence[Sample], step: int) -> float:
        """One optimizer step, counted from 1; returns the mean cross-entropy of a token before it."""
        settings, model = self._recipe.sft, self.policy.model
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / max(settings.warmup_steps, 1))
        groups = [self.encode(sample) for sample in samples]
        tokens = sum(len(group.completions[0]) for group in groups)
        self._optimizer.zero_grad()
        total = 0.0
        for batch in make_microbatches(groups, self.policy.layout, self._recipe.train.tokens_per_microbatch):
            loss = self._cross_entropy(batch.to(self._device)) / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self._recipe.train.max_grad_norm)
        if not (torch.isfinite(norm) and math.isfinite(total)):
            raise DivergedError(
                f"step {step}: gradient norm {norm.item()}, loss {total}; expected finite numbers. Lower sft.learning_rate"
            )
        self._optimizer.step()
        return total

    def encode(self, sample: Sample) -> EncodedGroup:
        """A sample as a group of the one completion to imitate.

        Raises:
            InputError: it has no chain though chains are the target, its texts hold markup, or it is too long.
        """
        thought = None
        if self._target == "think":
            if sample.thought is None or not sample.thought.strip():
                raise InputError(f"{sample.label}: no chain of thought; give its row one, or train with target answer")
            thought = sample.thought.strip()
        refuse_markup(sample, self.policy)
        names = tuple(sample.images)
        messages = build_messages(sample.question, names)
        prompt = encode_prompt(sample, messages, names, self.policy, self._recipe.data.max_image_pixels)
        frame = frame_size(self._frame, sample.truth, prompt.grid_thw, self.policy)
        ids = completion_ids(completion_text(sample.truth, thought, frame), self.policy)
        length, most = len(prompt.token_ids) + len(ids), self._recipe.model.max_model_len
        if length > most:
            raise TooLongError(
                f"{sample.label}: {length} tokens of prompt and completion; expected at most {most} (model.max_model_len)"
            )
        return EncodedGroup(prompt, (ids,))

    def _cross_entropy(self, batch: Microbatch) -> torch.Tensor:
        """Summed over the completions' tokens, at temperature 1."""
        bf16 = self._device.type == "cuda" and self._recipe.model.dtype == "bfloat16"
        with torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext():
            logprobs = completion_logprobs(self.policy.model, batch, 1.0, self._recipe.train.logprob_chunk_tokens)
        return -logprobs.sum()


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mars_trainer.sft", description="Fine-tune a recipe's model on its training samples.")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML recipe, e.g. recipes/digits.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the model goes; a new folder")
    parser.add_argument("--target", choices=["answer", "think"], help="what is imitated; default: the recipe's sft.target")
    options = parser.parse_args()
    try:
        sft(load_recipe(options.recipe), options.out, _write_line, options.target)
    except MarsError as error:
        sys.stderr.write(f"mars: {error}\n")
        return error.exit_code
    return 0


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
