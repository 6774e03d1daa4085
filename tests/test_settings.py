"""Recipes are read strictly, environment overrides too; every refusal names the key and what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mars_shared.contracts import Decoding, View
from mars_shared.errors import ConfigError
from mars_shared.settings import Recipe, load_deployment, load_recipe

RECIPE = """
[run]
name = "r"
dir = "runs/r"

[model]
path = "models/tiny"
max_model_len = 512

[data]
dataset = "digits"

[rollout]
num_generations = 4
max_completion_length = 16

[train]
steps = 3
prompts_per_step = 2
learning_rate = 1e-3
"""

pytestmark = pytest.mark.usefixtures("clean_environment")


def load(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def with_line(section: str, line: str) -> str:
    """RECIPE with a line in a section, instead of the line of the same key if there is one."""
    key = line.partition("=")[0].strip()
    kept = [old for old in RECIPE.splitlines() if old.partition("=")[0].strip() != key]
    kept.insert(kept.index(f"[{section}]") + 1, line)
    return "\n".join(kept)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value)


def test_a_recipe_says_what_is_trained_and_the_rest_has_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE)
    assert (recipe.run.name, recipe.run.dir, recipe.run.seed) == ("r", Path("runs/r"), 0)
    assert (recipe.rollout.num_generations, recipe.rollout.num_mono) == (4, 1)
    assert recipe.rollout.mono_view is View.SINGLE and recipe.rollout.mono_decoding is Decoding.SAMPLE
    assert recipe.model.box_frame is None
    assert recipe.train.adam_betas == (0.9, 0.99)


def test_the_recipes_that_come_with_the_project_load(root: Path) -> None:
    paths = sorted((root / "recipes").glob("*.toml"))
    assert {path.stem for path in paths} >= {"digits", "scene"}
    for path in paths:
        assert load_recipe(path).train.steps > 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read \(No such file or directory\)"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "recipe.toml: not valid TOML" in refusal(tmp_path, RECIPE + "\nsteps 5")
    assert "line 22" in refusal(tmp_path, RECIPE + "\nsteps 5")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_line("train", "learning_rat = 1e-3"), "unknown key train.learning_rat"),
        (RECIPE + "[trian]\nsteps = 3", "unknown key trian"),
        ("steps = 3\n" + RECIPE, "unknown key steps"),
        (RECIPE.replace("steps = 3\n", ""), "missing key train.steps"),
        (RECIPE.replace("[data]\ndataset", "[eval]\nevery = 1\n[data]\n#"), "neither of data.dataset and data.train given"),
        (RECIPE.split("[train]")[0], "missing key train"),
        ("", "missing key run"),
    ],
)
def test_an_unknown_or_missing_key_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", 'steps = "3"', "train.steps = '3': Input should be a valid integer"),
        ("train", "steps = 3.0", "train.steps = 3.0"),
        ("train", "steps = true", "train.steps = True"),
        ("train", 'learning_rate = "1e-3"', "train.learning_rate = '1e-3'"),
        ("train", "scale_rewards = 1", "train.scale_rewards = 1"),
        ("train", "adam_betas = [0.9]", "train.adam_betas"),
        ("run", "name = 7", "run.name = 7"),
        ("run", "dir = 7", "run.dir = 7"),
        ("rollout", 'num_generations = "4"', "rollout.num_generations = '4'"),
    ],
)
def test_a_wrong_type_is_refused_and_not_converted(tmp_path: Path, section: str, line: str, message: str) -> None:
    assert message in refusal(tmp_path, with_line(section, line))


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", "steps = 0", "train.steps = 0: Input should be greater than or equal to 1"),
        ("train", "learning_rate = -1.0", "train.learning_rate = -1.0"),
        ("train", "learning_rate = nan", "train.learning_rate"),
        ("train", "learning_rate = inf", "train.learning_rate"),
        ("train", "max_staleness = 1", "train.max_staleness is 1 with train.importance_correction = 'none'"),
        ("train", 'advantage = "ppo"', "'mars', 'grpo' or 'dr_grpo'"),
        ("run", 'name = "a:b"', "run.name = 'a:b'"),
        ("run", 'name = ""', "run.name = ''"),
        ("run", "seed = -1", "run.seed = -1"),
        ("data", 'dataset = "mnist"', "'digits'"),
        ("rollout", 'mono_view = "double"', "'single' or 'repeat'"),
        ("rollout", "top_p = 0.0", "rollout.top_p = 0.0"),
        ("rollout", "temperature = 11.0", "temperature"),
        (
            "rollout",
            "max_completion_length = 512",
            "rollout.max_completion_length is 512; expected less than model.max_model_len = 512",
        ),
        ("reward", 'recipe = ""', "reward.recipe = ''"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(tmp_path: Path, section: str, line: str, message: str) -> None:
    text = RECIPE + f"[reward]\n{line}" if section == "reward" else with_line(section, line)
    assert message in refusal(tmp_path, text)


def test_a_rule_about_several_keys_is_told_in_one_short_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, recipe = with_line("rollout", "max_completion_length = 512"), tmp_path / "recipe.toml"
    told = "rollout.max_completion_length is 512; expected less than model.max_model_len = 512"
    assert refusal(tmp_path, text) == f"recipe {recipe}: {told}"
    monkeypatch.setenv("MARS_RUN__SEED", "1")
    assert refusal(tmp_path, text) == f"recipe {recipe} with MARS_RUN__SEED from the environment: {told}"
    both = refusal(tmp_path, RECIPE.replace("[data]", '[data]\ntrain = [{path = "a.jsonl"}]'))
    assert both == f"recipe {recipe}: both of data.dataset and data.train given; expected one of them"
    table = refusal(tmp_path, RECIPE.replace('dataset = "digits"', 'train = {path = "a.jsonl"}'))
    assert table == f"recipe {recipe}: data.train = {{'path': 'a.jsonl'}}: Input should be a valid array"


def test_more_greedy_mono_completions_than_one_are_refused(tmp_path: Path) -> None:
    text = with_line("rollout", 'num_mono = 2\nmono_decoding = "greedy"')
    assert "num_mono is 2 with greedy mono decoding; expected 0 or 1" in refusal(tmp_path, text)


@pytest.mark.parametrize("line", ["adam_betas = [0.9, 1.0]", "adam_betas = [-0.1, 0.9]"])
def test_moment_decays_that_the_optimizer_would_refuse_are_refused_here(tmp_path: Path, line: str) -> None:
    assert "adam_betas" in refusal(tmp_path, with_line("train", line))


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_TRAIN__STEPS", "10")
    monkeypatch.setenv("MARS_RUN__DIR", "runs/elsewhere")
    recipe = load(tmp_path, RECIPE)
    assert (recipe.train.steps, recipe.run.dir) == (10, Path("runs/elsewhere"))
    assert (recipe.train.prompts_per_step, recipe.run.name) == (2, "r")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MARS_TRAIN__STEPS", "ten", r"MARS_TRAIN__STEPS.*train.steps = 'ten'"),
        ("MARS_TRAIN__STEP", "10", "MARS_TRAIN__STEP in the environment names no recipe key"),
        ("MARS_TRIAN__STEPS", "10", "MARS_TRIAN__STEPS in the environment names no recipe key"),
        ("MARS_MODEL", "models/tiny", "MARS_MODEL in the environment names no recipe key"),
        ("MARS_TRAIN__ADAM_BETAS", "0.9", r"MARS_TRAIN__ADAM_BETAS.*from the environment: train.adam_betas"),
    ],
)
def test_a_wrong_override_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, RECIPE)


def test_variables_that_name_places_do_not_disturb_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_REWARD_URL", "http://reward:8200")
    monkeypatch.setenv("MARS_REDIS_URL", "redis://redis:6379/0")
    monkeypatch.setenv("MARS_STACK", "cpu")
    assert load(tmp_path, RECIPE).reward.recipe == "paper"


def test_evaluation_asks_for_one_greedy_completion_of_each_kind(tmp_path: Path) -> None:
    spec = load(tmp_path, with_line("rollout", "num_mono = 3")).rollout.greedy_spec(seed=5)
    assert (spec.num_generations, spec.num_mono, spec.seed) == (1, 1, 5)
    assert spec.mono_decoding is Decoding.GREEDY and spec.multi_decoding is Decoding.GREEDY
    assert type(spec).model_validate(spec.model_dump()) == spec


def test_the_deployment_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_deployment().host == "127.0.0.1" and load_deployment().api_key is None
    monkeypatch.setenv("MARS_API_KEY", "s3cret")
    deployment = load_deployment()
    assert deployment.api_key is not None and deployment.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(deployment)


@pytest.mark.parametrize(("name", "value"), [("MARS_LEASE_S", "soon"), ("MARS_LEASE_S", "0"), ("MARS_MAX_BODY_MIB", "0.5")])
def test_a_wrong_deployment_variable_is_refused_and_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"environment MARS_\*: {name[5:].lower()} = '{value}'"):
        load_deployment()


@pytest.mark.parametrize(("name", "meant"), [("MARS_REDIS_ULR", "MARS_REDIS_URL"), ("MARS_APIKEY", "MARS_API_KEY")])
def test_a_misspelt_deployment_variable_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv("MARS_STACK", "cpu")
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"{name} in the environment is no setting; did you mean {meant}"):
        load_deployment()


def test_an_override_with_one_underscore_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARS_TRAIN_STEPS", "20")
    with pytest.raises(ConfigError, match="MARS_TRAIN_STEPS in the environment is no setting; did you mean MARS_TRAIN__STEPS"):
        load(tmp_path, RECIPE)


def test_importance_correction_needs_the_whole_distribution(tmp_path: Path) -> None:
    text = with_line("train", 'importance_correction = "token_truncate"')
    load(tmp_path, text)
    with pytest.raises(ConfigError, match=r"expected top_p = 1"):
        load(tmp_path, text.replace("[rollout]", "[rollout]\ntop_p = 0.9"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dual_clip = 1.1", "expected more than 1"),
        ("overlong_buffer = 17", "expected at most rollout.max_completion_length = 16"),
    ],
)
def test_algorithm_settings_that_contradict_each_other_are_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, with_line("train", line))


def test_an_empty_api_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compose files write MARS_API_KEY=${MARS_API_KEY}, which is empty where nobody set it.
    monkeypatch.setenv("MARS_API_KEY", "")
    assert load_deployment().api_key is None


@pytest.mark.parametrize("key", ["schlüssel", "κλειδί", "two\nlines", " before", "after ", "s3cret\t"])
def test_a_key_that_no_header_carries_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MARS_API_KEY", key)
    with pytest.raises(ConfigError, match="MARS_API_KEY has characters that an HTTP header does not carry") as refused:
        load_deployment()
    assert key.strip() not in str(refused.value)


def test_any_printable_ascii_can_be_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "".join(map(chr, range(33, 127))) + " ~"
    monkeypatch.setenv("MARS_API_KEY", key)
    deployment = load_deployment()
    assert deployment.api_key is not None and deployment.api_key.get_secret_value() == key


def test_the_command_line_answers_a_wrong_recipe_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(with_line("train", "learning_rat = 1e-3"))
    done = subprocess.run([sys.executable, "-m", "mars_shared.cli", "train", str(recipe)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"mars: recipe {recipe}: unknown key train.learning_rat"
    assert list(tmp_path.iterdir()) == [recipe]
