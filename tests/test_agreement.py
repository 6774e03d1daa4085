"""Sampler and trainer are one policy: same pixels, same token ids, same log-probabilities."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from mars_rollout.engine.base import Engine
from mars_rollout.group import GroupMaker
from mars_shared.contracts import Purpose, RolloutGroup, View
from mars_trainer.agreement import bounds_of, differences, logprob_differences
from mars_trainer.batching import EncodedGroup, EncodedPrompt, make_microbatches, pixels
from mars_trainer.learner import Learner
from mars_trainer.model import Policy, completion_logprobs
from mars_trainer.selftest import sampler_facts, trainer_facts
from rollout_fixtures import History, RunFolder, adhoc, make_prompt, png

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
BOUND = 1e-4


def largest_difference(policy: Policy, group: RolloutGroup) -> float:
    """Of the log-probabilities that vLLM returned and those the trainer computes for the same tokens."""
    pictures = {source.name: Image.open(io.BytesIO(png(seed))) for seed, source in enumerate(group.prompt.sources)}
    worst = 0.0
    for view in group.views:
        pixel_values, grid_thw = pixels(policy.processor, [pictures[name] for name in view.images])
        members = [completion for completion in group.completions if completion.source == view.source]
        encoded = EncodedGroup(
            EncodedPrompt(group.group_id, view.token_ids, pixel_values, grid_thw), tuple(c.token_ids for c in members)
        )
        (batch,) = make_microbatches([encoded], policy.layout, 10**6)
        with torch.no_grad():
            computed = completion_logprobs(policy.model, batch, group.prompt.sampling.temperature, 1024)
        returned = torch.zeros_like(computed)
        for row, member in enumerate(members):
            returned[row, : len(member.logprobs)] = torch.tensor(member.logprobs)
        worst = max(worst, float((computed - returned).abs().max()))
    return worst


def load(policy: Policy, tensors: dict[str, torch.Tensor]) -> None:
    policy.model.load_state_dict(tensors, strict=False)


async def test_logprobs_agree_at_every_version_of_a_history(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, trainer_policy: Policy
) -> None:
    """Two images, multi- and mono-source views; odd versions change the vision tower alone."""
    prompt = adhoc(make_prompt(run_folder.blobs))
    differences, groups = [], []
    for index, manifest in enumerate(history.manifests[:4]):
        await engine.update(manifest, history.files(index))
        load(trainer_policy, history.tensors[index])
        group = await maker.make(prompt)
        assert group.policy_version == manifest.version
        assert {span.version for c in group.completions for span in c.spans} == {manifest.version}
        differences.append(largest_difference(trainer_policy, group))
        groups.append(group)
    assert max(differences) < BOUND, differences
    firsts = [group.completions[0].logprobs for group in groups]
    assert len(set(firsts)) == len(firsts), "every version answers differently, so the comparison means something"


@pytest.mark.parametrize("view", list(View))
async def test_both_mono_views_agree(
    view: View, engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, trainer_policy: Policy
) -> None:
    await engine.update(history.manifests[3], history.files(3))
    load(trainer_policy, history.tensors[3])
    prompt = adhoc(make_prompt(run_folder.blobs))
    prompt = prompt.model_copy(update={"sampling": prompt.sampling.model_copy(update={"mono_view": view, "temperature": 0.7})})
    assert largest_difference(trainer_policy, await maker.make(prompt)) < BOUND


async def test_sampled_placeholder_tokens_survive_and_agree(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, trainer_policy: Policy
) -> None:
    """4096 tokens of an almost uniform policy over some 730 tokens hold some image placeholders."""
    await engine.update(history.manifests[0], history.files(0))
    load(trainer_policy, history.tensors[0])
    prompt = adhoc(make_prompt(run_folder.blobs))
    sampling = prompt.sampling.model_copy(update={"num_generations": 64, "num_mono": 0, "max_completion_length": 64})
    group = await maker.make(prompt.model_copy(update={"sampling": sampling}))
    placeholder = trainer_policy.layout.image_token_id
    with_placeholders = [c for c in group.completions if placeholder in c.token_ids]
    assert with_placeholders, "no placeholder was sampled; choose another seed"
    assert largest_difference(trainer_policy, group) < BOUND


async def test_a_wrong_weight_is_noticed(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, trainer_policy: Policy
) -> None:
    """The comparison itself fails when the trainer holds another vision tower than the sampler."""
    await engine.update(history.manifests[1], history.files(1))
    load(trainer_policy, history.tensors[2])
    assert largest_difference(trainer_policy, await maker.make(adhoc(make_prompt(run_folder.blobs)))) > BOUND


async def test_a_probe_passes_the_self_test_and_another_processor_fails_it(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History
) -> None:
    """The engine has seen the images before: what it hashes for a probe is preprocessed anew, and the trainer's to the bit."""
    await engine.update(history.manifests[3], history.files(3))
    prompt = make_prompt(run_folder.blobs, policy_version=history.manifests[3].version)
    await maker.make(prompt)
    group = await maker.make(prompt.model_copy(update={"purpose": Purpose.PROBE}))
    recipe, learner = run_folder.recipe, Learner(run_folder.recipe, run_folder.blobs)
    load(learner.policy, history.tensors[3])
    bounds, sampler = bounds_of(recipe, "cpu"), sampler_facts(group, learner.policy.layout.image_token_id)
    trainer = trainer_facts(group, learner, recipe)
    assert differences(sampler, trainer, bounds) == []
    assert logprob_differences(sampler, trainer).maximum < BOUND
    assert [len(facts.pixels) for facts in sampler.values()] == [2, 1, 1]

    learner.policy.processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    lines = differences(sampler, trainer_facts(group, learner, recipe), bounds)
    assert sum("pixels of image" in line for line in lines) == 4 and any("log-probabilities" in line for line in lines), lines

    learner.policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
    lines = differences(sampler, trainer_facts(group, learner, recipe), bounds)
    assert any("tokens of images visible, infrared: sampler (4, 4), trainer (1, 1)" in line for line in lines), lines
    assert any("box frame: sampler resized 56 x 56, trainer resized 28 x 28" in line for line in lines), lines
