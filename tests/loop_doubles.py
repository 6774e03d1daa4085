"""Doubles around the training loop: an exchange that answers at once, a learner and stores that only note what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from builders import make_group, make_score, make_scored
from mars_shared.blobs import BlobStore
from mars_shared.contracts import PolicyVersion, Prompt, ScoredGroup
from mars_shared.errors import InputError
from mars_shared.queue import Claim, DeadLetter
from mars_shared.settings import load_recipe
from mars_shared.telemetry import EventLog
from mars_trainer.checkpoint import Checkpoint, Ledger
from mars_trainer.credit import Credit
from mars_trainer.datasets import RunData, load_dataset
from mars_trainer.dispatch import PromptMaker
from mars_trainer.exchange import Answer, Death, Exchange, Retry
from mars_trainer.group_log import GroupLog
from mars_trainer.loop import TrainingRun
from mars_trainer.progress import Progress

RECIPE = """
[run]
name = "test"
dir = "{dir}"
[model]
path = "{dir}"
max_model_len = 256
[data]
dataset = "digits"
[rollout]
num_generations = 2
max_completion_length = 8
[train]
steps = 3
prompts_per_step = 3
learning_rate = 1e-3
checkpoint_every = 1
dynamic_sampling = "pool"
max_generation_batches = 3
"""


LETTER = DeadLetter("1-0", b"", "key", "ImageError", "source 'visible' is torn", "mars:test:prompts", 1, 0.0)


class Replies:
    """Answers every prompt; rewards differ for the dispatch indices in `telling` alone, and those in `deadly` die."""

    def __init__(self, telling: Iterable[int], deadly: Iterable[int] = ()) -> None:
        self.telling, self.deadly = set(telling), set(deadly)
        self.waiting: list[Prompt] = []
        self.retries: list[Retry] = []
        self.reported: list[tuple[int, str]] = []
        self.asked: list[list[int]] = []
        self.acknowledged: list[int] = []

    def ask(self, prompts: Iterable[Prompt]) -> None:
        self.waiting += prompts

    async def receive(self) -> tuple[list[Answer], list[Death]]:
        prompts, self.waiting = self.waiting, []
        if prompts:
            self.asked.append([prompt.dispatch_index for prompt in prompts])
        deaths = [Death(prompt, LETTER) for prompt in prompts if prompt.dispatch_index in self.deadly]
        return [self._answer(prompt) for prompt in prompts if prompt.dispatch_index not in self.deadly], deaths

    async def gather(self, prompts: Iterable[Prompt], *, on_death: Any, on_progress: Any) -> list[Answer]:
        self.ask(prompts)
        answers = (await self.receive())[0]
        on_progress(len(answers))
        return answers

    async def report_dead(self, dispatch_index: int, error: InputError) -> None:
        self.reported.append((dispatch_index, str(error)))

    def take_retry(self) -> Retry | None:
        return self.retries.pop(0) if self.retries else None

    async def start(self, dispatched: Sequence[Prompt] = (), **_: Any) -> list[Prompt]:
        """Nothing is left from before."""
        return list(dispatched)

    async def acknowledge(self, claims: Iterable[Claim]) -> None:
        self.acknowledged += [int(claim.entry_id) for claim in claims]

    def _answer(self, prompt: Prompt) -> Answer:
        return Answer(Claim("s", str(prompt.dispatch_index), "c", 1, b""), self._scored(prompt))

    def _scored(self, prompt: Prompt) -> ScoredGroup:
        group = make_group(prompt)
        rest = 0.0 if prompt.dispatch_index in self.telling else 1.0
        return make_scored(group, [make_score(1.0), *(make_score(rest) for _ in group.completions[1:])])


class Pupil:
    """Notes which dispatch indices it is taught, step by step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.model = None
        self.before_update: Callable[[], None] = lambda: None

    def step(self, groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> dict[str, float]:
        self.steps.append([scored.group.prompt.dispatch_index for scored in groups])
        return {}

    def skip(self) -> None:
        self.steps.append([])

    def model_tensors(self) -> dict[str, Any]:
        return {}

    optimizer_tensors = model_tensors


class Shelf:
    """Keeps checkpoints and published versions in memory."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.versions: list[PolicyVersion] = []
        self.mended = False

    def save(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def encode(self, model: object, version: PolicyVersion) -> None:
        self._encoded = version

    def announce(self) -> None:
        self.versions.append(self._encoded)

    def upload(self) -> None:
        """Nowhere."""

    def mend(self) -> None:
        self.mended = True

    def needs_snapshot(self) -> bool:
        return False

    def needs_upload(self) -> bool:
        return False


def make_run(
    folder: Path,
    training: Replies | Exchange,
    pupil: Pupil,
    shelf: Shelf,
    *,
    evaluation: Exchange | None = None,
    checkpoint: Ledger | None = None,
    **train: Any,
) -> TrainingRun:
    """A run over doubles, from the start or from a checkpoint's ledger; `train` changes the recipe's section."""
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "recipe.toml").write_text(RECIPE.format(dir=folder))
    recipe = load_recipe(folder / "recipe.toml")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    version = PolicyVersion(incarnation=1, step=0)
    ledger = Ledger(run="test", model="m", version=version, next_dispatch_index=0, consumed=())
    if checkpoint is not None:
        version = PolicyVersion(incarnation=checkpoint.version.incarnation + 1, step=checkpoint.version.step)
        ledger = checkpoint.model_copy(update={"version": version})
    return TrainingRun(
        recipe=recipe,
        data=RunData(load_dataset("digits").train, {}),
        learner=cast(Any, pupil),
        prompts=PromptMaker(recipe, BlobStore(folder / "blobs")),
        training=cast(Any, training),
        evaluation=cast(Any, evaluation or SimpleNamespace()),
        publisher=cast(Any, shelf),
        checkpoints=cast(Any, shelf),
        events=EventLog(folder / "events.jsonl"),
        groups=GroupLog(folder / "groups"),
        evaluations=folder / "evaluations",
        ledger=ledger,
        restored_from=checkpoint.version if checkpoint else None,
        progress=Progress(run="test", steps=3, version=version),
    )
