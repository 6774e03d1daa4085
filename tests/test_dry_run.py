"""`mars train --dry-run`: what a run would be, without starting it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mars_shared.settings import load_recipe
from mars_trainer.dry_run import main, resolved
from mars_trainer.memory import ModelShape, model_shape, needs
from mars_trainer.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("clean_environment")

TINY_RECIPES = ("grpo", "mars-grpo", "dapo", "mars-dapo")
GIB = 2**30


def differing(first: Path, second: Path) -> set[str]:
    """Keys whose values differ, the run's name and folder left out."""
    ones, others = (tomllib.loads(path.read_text()) for path in (first, second))
    return {
        f"{section}.{key}"
        for section in ones.keys() | others.keys()
        for key in ones.get(section, {}).keys() | others.get(section, {}).keys()
        if section != "run" and ones.get(section, {}).get(key) != others.get(section, {}).get(key)
    }


@pytest.mark.parametrize("folder", ["recipes", "recipes/tiny"])
def test_mars_differs_from_its_baseline_by_the_mono_rollouts_and_the_advantage(root: Path, folder: str) -> None:
    for baseline in ("grpo", "dapo"):
        found = differing(root / folder / f"{baseline}.toml", root / folder / f"mars-{baseline}.toml")
        assert found == {"rollout.num_mono", "train.advantage"}


def test_dapo_differs_from_grpo_by_what_dapo_is(root: Path) -> None:
    dapo = {f"train.{key}" for key in ("epsilon_high", "dual_clip", "dynamic_sampling", "max_generation_batches")}
    dapo |= {"train.overlong_buffer", "train.overlong_penalty", "train.loss_type", "train.beta"}
    assert differing(root / "recipes/tiny/grpo.toml", root / "recipes/tiny/dapo.toml") == dapo


def test_released_differs_from_the_paper_by_the_table_of_both(root: Path) -> None:
    both = {"rollout.mono_view", "rollout.mono_decoding", "rollout.top_p", "reward.recipe"}
    assert differing(root / "recipes/mars-grpo.toml", root / "recipes/released-grpo.toml") == both | {"train.loss_type"}
    assert differing(root / "recipes/mars-dapo.toml", root / "recipes/released-dapo.toml") == both | {"train.dynamic_sampling"}


def test_the_resolved_run_has_every_setting_and_is_the_same_recipe_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARS_TRAIN__STEPS", "7")
    for path in [root / "recipes/tiny/mars-dapo.toml", root / "recipes/mars-grpo.toml"]:
        recipe = load_recipe(path)
        (tmp_path / "again.toml").write_text(resolved(recipe))
        assert "steps = 7" in resolved(recipe)
        assert load_recipe(tmp_path / "again.toml") == recipe


def test_it_prints_the_run_its_memory_and_its_first_prompt_with_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(root / "recipes/tiny/mars-dapo.toml")]) == 0
    said = capsys.readouterr().out
    assert 'advantage = "mars"' in said and "boxes are written in the frame 'resized'" in said
    assert "first prompt: digits/train/" in said
    # 56 x 56 pixels are 2 x 2 merged patches of 28 pixels.
    assert "image visible: 56 x 56 pixels" in said and "4 tokens" in said and "tokens of all images: 8" in said
    assert "infrared: <|vision_start|><|image_pad|><|vision_end|> Which digit?" in said


def test_what_can_be_known_is_printed_before_what_is_missing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(root / "recipes/released-grpo.toml")]) == 2
    said = capsys.readouterr()
    assert 'recipe = "released"' in said.out and "models/Qwen2.5-VL-3B-Instruct: no such folder" in said.err


@pytest.mark.parametrize(
    ("url", "message"), [("nonsense", "'nonsense' is no URL of a weights store"), ("http://", "'http://' is no URL of a trainer")]
)
def test_a_url_of_the_weights_that_is_none_is_found(
    url: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARS_WEIGHTS__URL", url)
    assert main(["--recipe", str(root / "recipes/digits.toml")]) == 2
    assert message in capsys.readouterr().err


def test_memory_by_hand(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MODEL__DTYPE": "bfloat16",
        "ROLLOUT__KV_CACHE_MIB": "2048",
        "TRAIN__TOKENS_PER_MICROBATCH": "1024",
    }.items():
        monkeypatch.setenv(f"MARS_{name}", value)
    shape = ModelShape(parameters=GIB, layers=2, hidden=1024, vocabulary=1024, kv_values_per_token=64)
    found = {
        (need.place, need.part): need.size_bytes / GIB
        for need in needs(load_recipe(root / "recipes/digits.toml"), shape, sources=2)
    }
    assert found["trainer", "fp32 masters"] == found["trainer", "gradients"] == 4
    assert found["trainer", "AdamW state"] == 8 and found["trainer", "reference policy, for the KL"] == 4  # beta is 0.002
    # 17 values of 2 bytes, 2 layers, 1024 hidden units, 1024 tokens.
    assert found["trainer", "activations of 1024 tokens"] * GIB == 17 * 2 * 2 * 1024 * 1024
    assert found["trainer", "copy of the published weights"] == 2
    assert found["each replica", "copy of the weights, in the host's memory or on disk"] == 2
    assert found["each replica", "weights"] == 2 and found["each replica", "key-value cache, as rollout.kv_cache_mib says"] == 2
    # keep_checkpoints = 2 of 4 + 8 bytes a parameter, keep_snapshots = 2 of 2; of each one more while it is written.
    assert found["disk", "2 checkpoints, and the next while it is written"] == 3 * 12
    assert found["disk", "2 snapshots, and the next while it is written"] == 3 * 2


def test_a_models_shape_comes_from_its_files(root: Path, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, seed=0)
    assert model_shape(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())
