"""Any sequence of updates on the real engine, under load with shared images: what answers is what was published."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from mars_rollout.admission import SupersededError
from mars_rollout.engine.base import Engine, EngineRequest
from mars_rollout.group import GroupMaker
from mars_shared.contracts import Prompt, RolloutGroup, Source
from mars_shared.errors import InputError, IntegrityError, NotReadyError
from mars_trainer.model import Policy as TrainerPolicy
from mars_trainer.publish import policy_tensors
from rollout_fixtures import MAX_MODEL_LEN, History, RunFolder, adhoc, is_vision, make_prompt, png
from test_agreement import BOUND, largest_difference
from weight_line import Line, fetched_bytes, make_line, only_embedding, only_first_layer, said

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
PARTS: dict[str, Callable[[str], bool]] = {
    "vision tower": is_vision,
    "language layer": only_first_layer,
    "tied embedding": only_embedding,
}
ROLLBACK = "rollback"
ROUNDS = 3
"""Updates of each kind, in random order."""
UPDATES = 20


@dataclass
class Load:
    """Groups on the same images as those that tests look at, made all the time."""

    line: Line
    maker: GroupMaker
    prompt: Prompt
    staleness: int
    made: list[RolloutGroup] = field(default_factory=list)

    async def ask_adhoc(self) -> None:
        while True:
            self.made.append(await self.maker.make(adhoc(self.prompt)))

    async def ask_for_training(self) -> None:
        """Of the announced version; where that was overtaken meanwhile, of the next."""
        while True:
            assert self.line.head is not None
            update = {"policy_version": self.line.head.version, "max_staleness": self.staleness}
            prompt = self.prompt.model_copy(update=update)
            try:
                async with self.line.policy.hold(prompt):
                    self.made.append(await self.maker.make(prompt))
            except (SupersededError, InputError):
                await asyncio.sleep(0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask()) for ask in (self.ask_adhoc, self.ask_for_training)]
            yield
            for task in asking:
                task.cancel()

    def crossings(self) -> int:
        """Completions that went on over a change."""
        return sum(len(completion.spans) > 1 for group in self.made for completion in group.completions)


def long_prompt(run_folder: RunFolder, max_tokens: int = 48) -> Prompt:
    """About images that fill blocks of the prefix cache: (112 / 28) ** 2 = 16 tokens each, where a block has 32."""
    prompt = make_prompt(run_folder.blobs)
    sampling = prompt.sampling.model_copy(update={"max_completion_length": max_tokens})
    blobs = [run_folder.blobs.put(png(seed, 112, 112)) for seed in (0, 1)]
    names = ("visible", "infrared")
    sources = tuple(Source(name=name, blob=blob, media_type="image/png") for name, blob in zip(names, blobs, strict=True))
    return prompt.model_copy(update={"sampling": sampling, "sources": sources})


@pytest.mark.parametrize("in_flight", ["drain", "continue"])
async def test_after_any_sequence_of_updates_under_load_new_requests_match_the_trainer(
    in_flight: str, engine: Engine, maker: GroupMaker, run_folder: RunFolder, trainer_policy: TrainerPolicy, tmp_path: Path
) -> None:
    random, line = Random(in_flight), make_line(tmp_path, engine, run_folder.recipe, trainer_policy, in_flight=in_flight)
    load = Load(line, maker, long_prompt(run_folder), staleness=1 if in_flight == "continue" else 0)
    kinds = [*PARTS, ROLLBACK] * ROUNDS
    random.shuffle(kinds)
    first = line.publish()
    past, snapshots_before = [line.state()], fetched_bytes("snapshot")
    prompt = adhoc(make_prompt(run_folder.blobs))
    async with line.followed():
        await line.until_served(first, engine)
        answers = {first.checksum: said(await maker.make(prompt))}
        async with load.running():
            for seed, kind in enumerate(["vision tower", *kinds]):
                if kind == ROLLBACK:
                    step = random.randrange(max(len(past) - 1, 1))
                    del past[step + 1 :]
                    line.restart(step, past[step])
                else:
                    line.change(seed, PARTS[kind])
                    past.append(line.state())
                manifest = line.publish()
                await line.until_served(manifest, engine)
                group = await maker.make(prompt)
                assert group.weights_id == manifest.weights_id, kind
                assert {span.version for c in group.completions for span in c.spans} == {manifest.version}, kind
                assert (
                    largest_difference(
                        line.trainer,
                        group,
                    )
                    < BOUND
                ), (kind, line.policy.arrival)
                assert answers.setdefault(manifest.checksum, said(group)) == said(group), "the same weights answer alike"
                await line.policy.verify()
    assert len({str(answer) for answer in answers.values()}) == len(answers), "other weights answer otherwise"
    assert load.crossings() > 0, "ad-hoc requests were in flight at a change"
    assert fetched_bytes("snapshot") - snapshots_before == first.size_bytes, "all but the first came as deltas"


async def test_a_full_look_finds_what_changed_in_the_engine_behind_its_back(
    engine: Engine, run_folder: RunFolder, trainer_policy: TrainerPolicy, tmp_path: Path
) -> None:
    line = make_line(tmp_path, engine, run_folder.recipe, trainer_policy)
    manifest = line.publish()
    other = dict(policy_tensors(line.model, torch.float32))
    name = next(name for name in other if is_vision(name))
    other[name] = other[name] * (1 + 2**-20)
    save_file(other, tmp_path / "other")
    async with line.followed():
        await line.until_served(manifest, engine)
        await line.policy.verify()
        await engine.llm.apply_weights([str(tmp_path / "other")], str(manifest.version), manifest.weights_id)  # type: ignore[attr-defined]
        with pytest.raises(IntegrityError, match=rf"not those of {manifest.version}: .* 1 tensors .*{re.escape(name)}"):
            await line.policy.verify()
        line.change(1)
        await line.until_served(line.publish(), engine)
        await line.policy.verify()


async def test_a_full_look_finds_a_flipped_byte_of_the_mirror_and_the_next_version_comes_as_a_snapshot(
    engine: Engine, run_folder: RunFolder, trainer_policy: TrainerPolicy, tmp_path: Path
) -> None:
    line = make_line(tmp_path, engine, run_folder.recipe, trainer_policy)
    manifest = line.publish()
    async with line.followed():
        await line.until_served(manifest, engine)
        (mirror,) = (tmp_path / "scratch" / "mirror").iterdir()
        with mirror.open("r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)
            file.seek(-3, 2)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(IntegrityError, match=r"does not hold the bits of .*: tensors \S+ differ"):
            await line.policy.verify()
        with pytest.raises(NotReadyError):
            await line.policy.verify()
        line.change(1)
        await line.until_served(line.publish(), engine)
        assert line.policy.arrival.startswith(f"snapshot {manifest.version}, then 1 delta")
        await line.policy.verify()


async def test_many_updates_under_groups_that_share_images_leave_the_engine_alive(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History
) -> None:
    """In flight are requests whose images were hits in the prefix cache: pausing them with emptied caches would kill vLLM."""
    prompt = adhoc(long_prompt(run_folder, max_tokens=16))
    await engine.update(history.manifests[5], history.files(5))
    expected = said(await maker.make(prompt))
    for index in range(UPDATES):
        others = [asyncio.create_task(maker.make(prompt)) for _ in range(3)]
        await asyncio.sleep(0.02)
        place = 6 - index % 2
        await engine.update(history.manifests[place], history.files(place))
        await asyncio.gather(*others)
    assert engine.alive
    assert said(await maker.make(prompt)) == expected


async def test_seeded_requests_that_would_be_cut_into_chunks_are_answered(engine: Engine, history: History) -> None:
    """40 prompts of 350 tokens, where 8192 are computed in one step; vLLM's CPU sampler fails on seeds in a cut prefill."""
    await engine.update(history.manifests[3], history.files(3))
    random = torch.Generator().manual_seed(0)

    def request(seed: int) -> EngineRequest:
        tokens = tuple(torch.randint(20, 700, (MAX_MODEL_LEN - 34,), generator=random).tolist())
        return EngineRequest(tokens, (), n=1, seed=seed, temperature=1.0, top_p=1.0, max_tokens=4, urgent=False)

    requests = [request(seed) for seed in range(40)]
    answers = await asyncio.gather(*(engine.generate(one) for one in requests))
    assert [len(answer.completions[0].token_ids) > 0 for answer in answers] == [True] * 40
    assert engine.alive
    for place in (0, 39):
        alone = await engine.generate(requests[place])
        assert alone.completions[0].token_ids == answers[place].completions[0].token_ids
