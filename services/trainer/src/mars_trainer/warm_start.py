"""The warm start: teach a tiny random policy to answer in format, with much room left.

Mostly it imitates right answers to single sources of any clarity (both mono-source views).
To pairs it sees answers of mixed worth: the source that the thought names is drawn at random
and part of the answers belong to other samples. So it reads single sources fairly, answers
pairs in format, and has yet to learn which source to trust. Stopping early on the schedule
leaves much to learn about reading too.

    python -m mars_trainer.warm_start --out models/tiny --seed 0
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor

from mars_shared.bars import progress
from mars_shared.contracts import FrameKind, Truth, View
from mars_shared.messages import build_messages, images_shown
from mars_shared.settings import DatasetName
from mars_trainer.batching import EncodedGroup, make_microbatches
from mars_trainer.datasets import Dataset, Sample, load_dataset
from mars_trainer.datasets.base import PAIR, clear
from mars_trainer.imitation import completion_ids, completion_text, encode_prompt, frame_size
from mars_trainer.model import Policy, completion_logprobs, layout_of
from mars_trainer.tiny import save_policy, write_tiny

MAX_IMAGE_PIXELS = 1 << 20


@dataclass(frozen=True)
class WarmStartConfig:
    """What a warm start depends on, besides package versions and CPU type.

    Attributes:
        out: folder of the model; made if it doesn't exist, files in it replaced.
        steps: length of the schedule along which the learning rate falls.
        stop_after: steps taken of it.
        samples: demonstrations a step, by dataset.
        learning_rate: its highest value; it warms up and then falls along a cosine.
        mono_share: share of single-source demonstrations.
        right_share: share of right answers among demonstrations on pairs.
    """

    out: Path
    seed: int = 0
    steps: int = 1000
    stop_after: int = 600
    samples: tuple[tuple[DatasetName, int], ...] = ((DatasetName.DIGITS, 32), (DatasetName.SCENE, 32))
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    mono_share: float = 0.85
    right_share: float = 0.6
    threads: int = 2


@dataclass(frozen=True)
class Demonstration:
    """A question in one view (`only` None: all sources), what to think of and what to answer."""

    sample: Sample
    source_names: tuple[str, ...]
    only: str | None
    view: View
    thought: str
    truth: Truth


def warm_start(config: WarmStartConfig, report: Callable[[str], None]) -> Path:
    """Write a tiny policy, train it, and return its folder; progress lines go to `report`."""
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    model = write_tiny(config.out, config.seed)
    processor = AutoProcessor.from_pretrained(config.out, local_files_only=True)
    train(Policy(model, processor, layout_of(model, processor)), config, report)
    save_policy(model, config.out)
    return config.out


def train(policy: Policy, config: WarmStartConfig, report: Callable[[str], None]) -> None:
    """Train a policy in place."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    rng = np.random.default_rng(config.seed)
    started = time.monotonic()
    last_step = min(config.stop_after, config.steps)
    with progress("warm start", "step", last_step) as advance:
        for step in range(1, last_step + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate_factor(step, config.steps, config.warmup_steps)
            losses = {name: _loss(policy, load_dataset(name), count, config, rng) for name, count in config.samples}
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            advance(step)
            if step % 25 == 0 or step == last_step:
                values = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
                report(f"warm start: step {step} of {last_step}, loss {values}, {time.monotonic() - started:.0f} s")


def _rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, step / warmup_steps) * (0.05 + 0.95 * cosine)


def _loss(policy: Policy, dataset: Dataset, count: int, config: WarmStartConfig, rng: np.random.Generator) -> Tensor:
    """Mean cross-entropy of the tokens of `count` demonstrations."""
    groups = [encode(demo, policy) for demo in demonstrate(dataset, count, config, rng)]
    tokens = sum(len(group.completions[0]) for group in groups)
    batches = make_microbatches(groups, policy.layout, tokens_per_microbatch=1 << 20)
    total = sum(completion_logprobs(policy.model, batch, 1.0, chunk_tokens=4096).sum() for batch in batches)
    return -torch.as_tensor(total) / tokens


def demonstrate(dataset: Dataset, count: int, config: WarmStartConfig, rng: np.random.Generator) -> list[Demonstration]:
    """`count` demonstrations, single sources and pairs mixed as the configuration says."""
    demos: list[Demonstration] = []
    for _ in range(count):
        if rng.random() < config.mono_share:
            sample = dataset.warmup[int(rng.integers(len(dataset.warmup)))]
            (name,) = sample.images
            view = View.SINGLE if rng.random() < 0.5 else View.REPEAT
            demos.append(Demonstration(sample, PAIR, name, view, name, sample.truth))
        else:
            sample = dataset.train[int(rng.integers(len(dataset.train)))]
            right = not demos or rng.random() < config.right_share
            truth = sample.truth if right else demos[int(rng.integers(len(demos)))].sample.truth
            demos.append(Demonstration(sample, PAIR, None, View.SINGLE, str(rng.choice([*PAIR, "both"])), truth))
    return demos


def encode(demo: Demonstration, policy: Policy) -> EncodedGroup:
    """A demonstration as a group of one completion, rendered as a replica renders a prompt."""
    shown = images_shown(demo.source_names, only=demo.only, view=demo.view)
    messages = build_messages(demo.sample.question, demo.source_names, only=demo.only, view=demo.view)
    prompt = encode_prompt(demo.sample, messages, shown, policy, MAX_IMAGE_PIXELS)
    frame = frame_size(FrameKind.RESIZED, demo.truth, prompt.grid_thw, policy)
    return EncodedGroup(prompt, (completion_ids(answer_text(demo.thought, demo.truth, frame), policy),))


def answer_text(thought: str, truth: Truth, frame: tuple[int, int]) -> str:
    """The completion to imitate; boxes in whole pixels of the resized image (width, height).

    Example:
        "<think>visible is clear</think><answer>7</answer>"
    """
    return completion_text(truth, clear(thought), frame)


def main() -> None:
    """The command line; every option has WarmStartConfig's default."""
    parser = argparse.ArgumentParser(prog="mars_trainer.warm_start", description="Warm-start a tiny policy.")
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (("seed", int), ("steps", int), ("stop-after", int), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(WarmStartConfig, name.replace("-", "_")))
    warm_start(WarmStartConfig(**vars(parser.parse_args())), report=_write_line)


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
