"""The optimizer step: what enters the loss, what does not, and going on from a checkpoint bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from builders import FRAME, V0, make_score, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import (
    Completion,
    FinishReason,
    FrameKind,
    Kind,
    Prompt,
    Purpose,
    RenderedView,
    RolloutGroup,
    ScoredGroup,
    Source,
)
from mars_shared.messages import build_messages
from mars_shared.settings import Recipe, load_recipe
from mars_trainer.batching import expand_placeholders, pixels
from mars_trainer.credit import Credit, credit
from mars_trainer.datasets import load_dataset
from mars_trainer.learner import Learner
from mars_trainer.tiny import SPECIAL_TOKENS, write_tiny

RECIPE = """
[run]
name = "learner-test"
dir = "{dir}"
[model]
path = "{dir}/model"
dtype = "float32"
max_model_len = 256
[data]
dataset = "digits"
[rollout]
num_generations = 4
max_completion_length = 8
[train]
steps = 10
prompts_per_step = 2
learning_rate = 1e-3
threads = 1
"""
ANSWERS = ((20, 30, 2), (40, 2), (50, 60, 70, 2), (80, 2))
IMAGE_PAD = SPECIAL_TOKENS.index("<|image_pad|>")
VIDEO_PAD = SPECIAL_TOKENS.index("<|video_pad|>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    write_tiny(folder / "model", seed=1)
    (folder / "recipe.toml").write_text(RECIPE.format(dir=folder))
    return folder


def make_learner(place: Path, **train: object) -> Learner:
    recipe = load_recipe(place / "recipe.toml")
    return Learner(recipe.model_copy(update={"train": recipe.train.model_copy(update=train)}), BlobStore(place / "blobs"))


def make_scored(
    learner: Learner,
    rewards: Sequence[float],
    mono_rewards: Sequence[float] = (0.0, 0.0),
    *,
    index: int = 0,
    answers: Sequence[tuple[int, ...]] = ANSWERS,
    mono_answer: tuple[int, ...] = (90, 2),
    views: int | None = None,
) -> ScoredGroup:
    """A group about a digits sample with the given answers, as a replica would have rendered it; `views` of one image."""
    sample = load_dataset("digits").test[index]
    if views is not None:
        sample = replace(sample, images={f"view-{number}": sample.images["visible"] for number in range(views)})
    blobs, policy = learner._blobs, learner.policy
    sources = tuple(Source(name=name, blob=blobs.put(data), media_type="image/png") for name, data in sample.images.items())
    prompt = Prompt(
        task_id=f"train-{index}",
        prompt_id=sample.prompt_id,
        run="learner-test",
        purpose=Purpose.TRAIN,
        epoch=0,
        dispatch_index=index,
        question=sample.question,
        sources=sources,
        truth=sample.truth,
        box_frame=FrameKind.RESIZED,
        sampling=sampling(4, 1),
        policy_version=V0,
    )
    shown = tuple(rendered(policy, sample, only) for only in (None, *sample.images))
    multi = [member(prompt, Kind.MULTI, None, i, ids) for i, ids in enumerate(answers)]
    mono = [member(prompt, Kind.MONO, name, 0, mono_answer) for name in sample.images]
    group = RolloutGroup(
        prompt=prompt,
        views=shown,
        completions=(*multi, *mono),
        policy_version=V0,
        weights_id="w",
        replica="r",
        started_at=0,
        generation_s=0,
    )
    scores = tuple(make_score(reward) for reward in (*rewards, *mono_rewards))
    return ScoredGroup(group=group, scores=scores, recipe="paper", scoring_started_at=0, reward_s=0)


def truncated(scored: ScoredGroup, *, index: int) -> ScoredGroup:
    """The same group, its multi-source completion `index` cut off at the length limit."""
    members = list(scored.group.completions)
    members[index] = members[index].model_copy(update={"finish_reason": FinishReason.LENGTH})
    return scored.model_copy(update={"group": scored.group.model_copy(update={"completions": tuple(members)})})


def as_sampled(learner: Learner, scored: ScoredGroup) -> ScoredGroup:
    """The same group with the log-probabilities that the learner's policy gives."""
    (part,) = learner._minibatches([scored], [credit_of(learner, scored)])[0]
    logprobs = learner._statistics(learner.model, part.batch).logprobs.tolist()
    members = list(scored.group.completions)
    for (_, index), row in zip(part.batch.rows, logprobs, strict=True):
        members[index] = members[index].model_copy(update={"logprobs": tuple(row[: len(members[index].token_ids)])})
    return scored.model_copy(update={"group": scored.group.model_copy(update={"completions": tuple(members)})})


def credit_of(learner: Learner, scored: ScoredGroup) -> Credit:
    return credit(scored, learner._recipe.train, learner._recipe.rollout.max_completion_length)


def step(learner: Learner, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    return learner.step(groups, [credit_of(learner, scored) for scored in groups])


def rendered(policy, sample, only: str | None) -> RenderedView:  # type: ignore[no-untyped-def]
    from mars_shared.images import open_image

    shown = list(sample.images) if only is None else [only]
    _, grid = pixels(policy.processor, [open_image(sample.images[name], what=name, max_pixels=10**6) for name in shown])
    messages = build_messages(sample.question, list(sample.images), only=only)
    text = policy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return RenderedView(source=only, token_ids=expand_placeholders(ids, grid, policy.layout), images=tuple(shown), frame=FRAME)


def member(prompt: Prompt, kind: Kind, source: str | None, index: int, ids: tuple[int, ...]) -> Completion:
    return Completion(
        group_id=prompt.task_id,
        kind=kind,
        source=source,
        index=index,
        text="",
        token_ids=ids,
        logprobs=(-1.0,) * len(ids),
        finish_reason=FinishReason.STOP,
        seed=None,
    )


def test_advantages_come_from_the_pool_of_both_kinds(place: Path) -> None:
    # pool (1, 0, 0, 0, 1, 1): mean 0.5, sum of squares 6 * 0.25 = 1.5, std sqrt(1.5 / 5) = 0.5477226
    learner = make_learner(place)
    advantages = credit_of(learner, make_scored(learner, (1, 0, 0, 0), (1, 1))).advantages
    assert advantages.advantages_G == pytest.approx((0.9128692, -0.9128692, -0.9128692, -0.9128692), abs=2e-6)
    assert advantages.gain == pytest.approx(0.25 - 1.0)


def test_a_step_makes_good_answers_likelier_and_bad_ones_less_likely(place: Path) -> None:
    learner = make_learner(place)
    group = make_scored(learner, (1, 0, 0, 0))
    (part,) = learner._minibatches([group], [credit_of(learner, group)])[0]
    before = learner._statistics(learner.model, part.batch).logprobs.sum(dim=1).detach()
    step(learner, [group])
    after = learner._statistics(learner.model, part.batch).logprobs.sum(dim=1).detach()
    assert after[0] > before[0]
    assert float((part.advantages_B * (after - before)).sum()) > 0


def test_what_mono_source_completions_say_never_enters_the_loss(place: Path) -> None:
    hashes = set()
    for mono_answer in ((90, 2), (100, 110, 120, 2)):
        learner = make_learner(place)
        step(learner, [make_scored(learner, (1, 0, 0, 0), (1, 0), mono_answer=mono_answer)])
        hashes.add(learner.weights_hash())
    assert len(hashes) == 1


def test_their_rewards_do(place: Path) -> None:
    hashes = set()
    for mono_rewards in ((1, 1), (0, 0)):
        learner = make_learner(place)
        step(learner, [make_scored(learner, (1, 0, 0, 0), mono_rewards)])
        hashes.add(learner.weights_hash())
    assert len(hashes) == 2


def test_completions_with_image_and_video_placeholders_train(place: Path) -> None:
    learner = make_learner(place)
    answers = ((IMAGE_PAD, 20, 2), (VIDEO_PAD, IMAGE_PAD, IMAGE_PAD, 2), (IMAGE_PAD,), (30, VIDEO_PAD, 2))
    before = learner.weights_hash()
    metrics = step(learner, [make_scored(learner, (1, 0, 0, 1), answers=answers)])
    assert metrics["grad_norm"] > 0 and metrics["tokens"] == 3 + 4 + 1 + 3
    assert learner.weights_hash() != before


def test_a_batch_without_signal_leaves_fresh_weights_as_they_are(place: Path) -> None:
    learner = make_learner(place)
    before = learner.weights_hash()
    step(learner, [make_scored(learner, (1, 1, 1, 1), (1, 1))])
    assert learner.weights_hash() == before


def test_a_masked_completion_changes_the_pool_and_nothing_else(place: Path) -> None:
    """The second completion was cut off: what it says never enters the loss, its reward stays in the pool."""
    hashes, tokens = set(), set()
    for second in ((41, 42), (43, 44)):
        learner = make_learner(place, mask_truncated_completions=True)
        scored = make_scored(learner, (1, 0, 0, 0), answers=(ANSWERS[0], second, ANSWERS[2], ANSWERS[3]))
        tokens.add(step(learner, [truncated(scored, index=1)])["tokens"])
        hashes.add(learner.weights_hash())
    assert len(hashes) == 1 and tokens == {3 + 4 + 2}


def test_with_importance_correction_equal_probabilities_change_nothing_and_others_do(place: Path) -> None:
    hashes = {}
    for name, correction, exact in (
        ("plain", "none", True),
        ("equal", "token_truncate", True),
        ("other", "token_truncate", False),
    ):
        learner = make_learner(place, importance_correction=correction)
        scored = make_scored(learner, (1, 0, 0, 0))
        step(learner, [as_sampled(learner, scored) if exact else scored])
        hashes[name] = learner.weights_hash()
    assert hashes["plain"] == hashes["equal"] != hashes["other"]


def test_a_sample_with_six_views_and_one_with_a_single_source_train_in_one_batch(place: Path) -> None:
    learner = make_learner(place)
    groups = [
        make_scored(learner, (1, 0, 0, 0), (0,) * 6, views=6),
        make_scored(learner, (1, 0, 0, 0), (1,), index=1, views=1),
        make_scored(learner, (0, 1, 0, 0), (1, 0), index=2),
    ]
    # Pools of 4 + 6, 4 + 1 and 4 + 2 rewards.
    assert [credit_of(learner, scored).advantages.pool_mean for scored in groups] == pytest.approx([1 / 10, 2 / 5, 2 / 6])
    before = learner.weights_hash()
    assert step(learner, groups)["tokens"] == 3 * (3 + 2 + 4 + 2)
    assert learner.weights_hash() != before


def test_microbatches_change_a_step_by_rounding_alone(place: Path) -> None:
    weights = []
    for limit in (16384, 60):
        learner = make_learner(place, tokens_per_microbatch=limit)
        step(learner, [make_scored(learner, (1, 0, 0, 0)), make_scored(learner, (0, 1, 0, 1), index=1)])
        weights.append(learner.model_tensors())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=2e-4, msg=name)


def test_going_on_from_a_checkpoint_equals_not_having_stopped_bit_by_bit(place: Path) -> None:
    straight, first = make_learner(place), make_learner(place)
    batches = [[make_scored(straight, (1, 0, 0, 0), index=i)] for i in range(3)]
    for batch in batches:
        step(straight, batch)
    step(first, batches[0])
    step(first, batches[1])
    resumed = make_learner(place)
    resumed.restore(first.model_tensors(), first.optimizer_tensors(), steps_done=2)
    step(resumed, batches[2])
    assert resumed.weights_hash() == straight.weights_hash()


def test_several_minibatches_clip_against_the_policy_before_the_step(place: Path) -> None:
    learner = make_learner(place, minibatch_prompts=1, learning_rate=0.05)
    groups = [make_scored(learner, (1, 0, 0, 0)), make_scored(learner, (1, 0, 0, 0))]
    metrics = step(learner, groups)
    assert metrics["clip_ratio/high"] + metrics["clip_ratio/low"] > 0


def test_the_kl_to_the_reference_is_zero_at_first_and_grows(place: Path) -> None:
    learner = make_learner(place, beta=0.1)
    group = make_scored(learner, (1, 0, 0, 0))
    assert step(learner, [group])["kl"] == pytest.approx(0, abs=1e-9)
    assert step(learner, [group])["kl"] > 0


def test_the_learning_rate_warms_up_and_falls(place: Path) -> None:
    learner = make_learner(place, warmup_steps=2, lr_schedule="linear", learning_rate=1.0e-3, steps=4)
    group = make_scored(learner, (1, 1, 1, 1), (1, 1))
    rates = [step(learner, [group])["learning_rate"] for _ in range(4)]
    # warm-up factors 0.5, 1, 1, 1 times linear factors 1, 0.75, 0.5, 0.25
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_an_image_that_is_gone_is_named(place: Path) -> None:
    from mars_shared.errors import BlobMissingError

    learner = make_learner(place)
    scored = make_scored(learner, (1, 0, 0, 0))
    prompt = scored.group.prompt
    gone = prompt.sources[0].model_copy(update={"blob": "f" * 64})
    prompt = prompt.model_copy(update={"sources": (gone, *prompt.sources[1:])})
    broken = scored.model_copy(update={"group": scored.group.model_copy(update={"prompt": prompt})})
    with pytest.raises(BlobMissingError, match="f" * 64):
        step(learner, [broken])


def test_recipes_in_the_project_load(root: Path, clean_environment: pytest.MonkeyPatch) -> None:
    recipes = [load_recipe(path) for path in sorted((root / "recipes").glob("*.toml"))]
    assert len(recipes) >= 2 and all(isinstance(recipe, Recipe) for recipe in recipes)
