"""`mars compare`: Student's and Welch's intervals by hand, which runs are seeds of one recipe, and what is shown of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from command_line import CommandLine, command_line
from mars_shared.errors import ConfigError
from mars_shared.report.compare import compare, read_runs
from mars_shared.report.compare_page import render
from mars_shared.report.intervals import difference_estimate, mean_estimate, t_quantile
from mars_shared.report.likeness import DATA, MODEL, OF_A_RUN, UNCOUNTED, UNCOUNTED_SECTIONS
from mars_shared.settings import Recipe
from run_folders import RunFolder
from test_html_report import HOSTILE, Page

__all__ = ["command_line"]


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-4)


@given(st.floats(0.9, 0.995), st.floats(1, 1e5))
def test_quantiles_are_right_between_the_tables_too(probability: float, freedom: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(student.ppf(probability, freedom), rel=1e-6)


@pytest.mark.parametrize(("probability", "freedom"), [(0.5, 2), (1.0, 2), (0.975, 0.5)])
def test_quantiles_that_are_not_computed_are_refused(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        t_quantile(probability, freedom)


def test_the_interval_of_three_seeds_is_students() -> None:
    # s = 0.04, half width = 4.303 * 0.04 / sqrt(3) = 0.0994
    found = mean_estimate([0.70, 0.74, 0.78])
    assert (found.mean, found.n) == (pytest.approx(0.74), 3)
    assert found.bounds == (pytest.approx(0.6406, abs=1e-4), pytest.approx(0.8394, abs=1e-4))


def test_one_seed_has_no_interval() -> None:
    assert mean_estimate([0.5]).bounds is None and difference_estimate([0.5], [0.5, 0.75]).bounds is None
    with pytest.raises(ValueError, match="at least one"):
        mean_estimate([])


def test_the_interval_of_a_difference_is_welchs() -> None:
    # Variances 0.0016 and 0.0002: a = 0.0016 / 3, b = 0.0002 / 2, a + b = 0.00063333.
    # v = 0.00063333² / (a² / 2 + b² / 1) = 4.0111e-7 / (1.4222e-7 + 1e-8) = 2.6350; t = 3.4525 (scipy)
    found = difference_estimate([0.70, 0.74, 0.78], [0.80, 0.82])
    half = student.ppf(0.975, 2.6350) * math.sqrt(0.00063333)
    assert (found.mean, found.n) == (pytest.approx(0.07), 2)
    assert found.bounds == (pytest.approx(0.07 - half, abs=1e-4), pytest.approx(0.07 + half, abs=1e-4))


def test_seeds_that_do_not_differ_make_an_interval_of_no_width() -> None:
    assert difference_estimate([0.5, 0.5], [0.75, 0.75]).bounds == (0.25, 0.25)


def finished_run(folder: Path, *, seed: int, multi: float, **train: object) -> Path:
    run = RunFolder(folder)
    run.start(seed=seed, **train)  # type: ignore[arg-type]
    run.evaluation(0, 0.25)
    for step in (1, 2):
        run.step(step, steps=2, gain=multi)
    run.evaluation(1, 0.875)
    run.evaluation(2, multi)
    run.events.write("finished", step=2, weights="ab")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of one learning rate, two of another."""
    first = [finished_run(tmp_path / f"a{seed}", seed=seed, multi=multi) for seed, multi in enumerate((0.70, 0.74, 0.78))]
    other = [
        finished_run(tmp_path / f"b{seed}", seed=seed, multi=multi, learning_rate=0.01) for seed, multi in enumerate((0.80, 0.82))
    ]
    return [*first, *other]


def test_runs_that_differ_in_name_folder_and_seed_alone_are_one_group(folders: list[Path]) -> None:
    found = compare(read_runs(folders))
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1, 2], [0, 1]]
    assert [group.settings for group in found.groups] == [{"train.learning_rate": 0.001}, {"train.learning_rate": 0.01}]
    assert [group.label for group in found.groups] == ["train.learning_rate = 0.001", "train.learning_rate = 0.01"]
    assert compare(read_runs(folders[:3])).groups[0].label == "all runs"


def test_numbers_are_means_over_seeds_against_the_first_group(folders: list[Path]) -> None:
    first, other = compare(read_runs(folders)).groups
    assert list(first.results) == ["multi", "mono/visible", "mono/infrared", "union", "multi_minus_union"]
    multi = first.results["multi"]
    assert multi.final.bounds == (pytest.approx(0.6406, abs=1e-4), pytest.approx(0.8394, abs=1e-4))
    assert (multi.best.mean, multi.best.bounds) == (0.875, (0.875, 0.875)) and multi.difference is None
    assert {(run.evaluated, run.best, run.state) for run in first.runs} == {(2, 1, "finished")}
    difference = other.results["multi"].difference
    assert difference == difference_estimate([0.70, 0.74, 0.78], [0.80, 0.82])
    # Union is 0.75 throughout: 0.74 - 0.75.
    assert first.results["multi_minus_union"].final.mean == pytest.approx(-0.01)


def test_a_setting_that_one_recipe_lacks_tells_groups_apart(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a", seed=0, multi=0.5), finished_run(tmp_path / "b", seed=0, multi=0.5, clip=2)]
    found = compare(read_runs(runs))
    assert [group.settings["train.clip"] for group in found.groups] == ["no such setting", 2]


def sections(place: str, replicas: int = 1, **more: dict[str, object]) -> dict[str, dict[str, object]]:
    """Of the same recipe on a machine of its own: other folders, another way of the weights, other trackers."""
    return {
        "model": {"path": f"{place}/models/tiny", "dtype": "bfloat16"},
        "data": {
            "train": [{"path": f"{place}/x.jsonl", "images": f"{place}/images", "name": None}],
            "max_faulty_share": replicas / 10,
        },
        "rollout": {"replicas": replicas, "threads": replicas, "num_generations": 4},
        "weights": {"url": f"http://{place}:8300", "snapshot_every": replicas},
        "track": {"trackers": [place]},
        "eval": {"every": replicas},
        **more,
    }


def test_what_does_not_change_what_is_learned_splits_no_recipe_and_is_told(tmp_path: Path) -> None:
    folders = [
        finished_run(tmp_path / place, seed=seed, multi=0.5, sections=sections(place, replicas=seed + 1), threads=seed + 1)
        for seed, place in enumerate(("here", "there"))
    ]
    found = compare(read_runs(folders))
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1]]
    assert found.passed_over["weights.url"] == ('"http://here:8300"', '"http://there:8300"')
    assert found.passed_over["model.path"] == ('"here/models/tiny"', '"there/models/tiny"')
    assert set(found.passed_over) == {
        *("model.path", "data.train", "data.max_faulty_share", "rollout.replicas", "rollout.threads"),
        *("weights.url", "weights.snapshot_every", "track.trackers", "eval.every", "train.threads"),
    }
    assert compare(read_runs(folders[:1])).passed_over == {}


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("model", {"path": "here/models/large", "dtype": "bfloat16"}),
        ("data", {"train": [{"path": "here/y.jsonl", "images": "here/images", "name": None}]}),
        ("rollout", {"replicas": 1, "threads": 1, "num_generations": 8}),
    ],
)
def test_another_model_other_data_and_another_way_to_learn_are_another_recipe(
    tmp_path: Path, section: str, settings: dict[str, object]
) -> None:
    first = finished_run(tmp_path / "a", seed=0, multi=0.5, sections=sections("here"))
    other = finished_run(tmp_path / "b", seed=1, multi=0.5, sections=sections("here", **{section: settings}))
    assert len(compare(read_runs([first, other])).groups) == 2


def test_models_on_record_count_by_their_content_and_others_by_their_name(tmp_path: Path) -> None:
    def run(name: str, seed: int, path: str, model: str | None) -> Path:
        return finished_run(tmp_path / name, seed=seed, multi=0.5, model=model, sections={"model": {"path": path}})

    same, moved = run("a", 0, "x/tiny", "f00d" * 16), run("b", 1, "y/small", "f00d" * 16)
    other, unknown = run("c", 2, "z/tiny", "beef" * 16), run("d", 3, "w/tiny", None)
    found = compare(read_runs([same, moved, other]))
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1], [2]]
    assert [group.settings for group in found.groups] == [
        {"model.path": "x/tiny, content f00df00df00d"},
        {"model.path": "z/tiny, content beefbeefbeef"},
    ]
    assert found.passed_over == {"model.path": ('"x/tiny"', '"y/small"', '"z/tiny"')}
    by_name = compare(read_runs([same, moved, other, unknown]))
    assert [[run.seed for run in group.runs] for group in by_name.groups] == [[0, 2, 3], [1]]
    assert [group.settings for group in by_name.groups] == [{"model.path": "tiny"}, {"model.path": "small"}]


def test_every_setting_that_does_not_count_is_one_of_a_recipe() -> None:
    known = {f"{name}.{key}" for name, section in Recipe.model_fields.items() for key in section.annotation.model_fields}
    assert {MODEL, *DATA, *OF_A_RUN, *UNCOUNTED} <= known and set(UNCOUNTED_SECTIONS) <= set(Recipe.model_fields)


def test_a_seed_that_a_recipe_has_twice_is_refused(folders: list[Path], tmp_path: Path) -> None:
    again = finished_run(tmp_path / "again", seed=1, multi=0.9)
    with pytest.raises(
        ConfigError, match=r"a1 and .*again are of the same recipe with the same seed, 1; expected each seed .* once"
    ):
        read_runs([*folders, again])


def test_seeds_that_have_not_come_as_far_as_the_others_are_refused(folders: list[Path], tmp_path: Path) -> None:
    RunFolder(tmp_path / "young").start(seed=7)
    RunFolder(tmp_path / "young").evaluation(1, 0.5)
    for names in ([folders[0], tmp_path / "young"], [tmp_path / "young", folders[0]]):
        with pytest.raises(ConfigError, match=r"was last evaluated at step \d.*at step \d; expected one step for all seeds"):
            read_runs(names)


def test_versions_that_differ_are_said(tmp_path: Path) -> None:
    for seed, (name, version) in enumerate((("a", "2.9.1"), ("b", "2.10.0"))):
        RunFolder(tmp_path / name).start(seed=seed, versions={"torch": version, "numpy": "2.3"})
        RunFolder(tmp_path / name).evaluation(0, 0.5)
    assert compare(read_runs([tmp_path / "a", tmp_path / "b"])).versions == {"torch": ("2.9.1", "2.10.0")}


def test_runs_that_cannot_be_compared_are_named_with_the_reason(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([folders[0], folders[0].parent / "a1" / ".." / "a0"])
    RunFolder(tmp_path / "old").evaluation(0, 0.5)
    with pytest.raises(ConfigError, match=r"old has no `started` event"):
        read_runs([tmp_path / "old"])
    RunFolder(tmp_path / "young").start()
    with pytest.raises(ConfigError, match="young has no evaluation yet"):
        read_runs([tmp_path / "young"])
    with pytest.raises(ConfigError, match="no run folder"):
        read_runs([tmp_path])


def test_the_page_has_bands_over_seeds_and_loads_nothing(folders: list[Path], tmp_path: Path) -> None:
    odd = finished_run(tmp_path / "c", seed=0, multi=0.5, note=HOSTILE, sections={"weights": {"url": "s3://x"}})
    html = render(read_runs([*folders, odd]))
    page = Page(html)
    assert "script" not in page.names() and all(link.startswith("#") for link in page.links())
    assert "6 runs, 3 recipes" in page.text and "train.learning_rate = 0.01" in page.text and "<script>alert(1)" in page.text
    assert 'tell no recipes apart:weights.url: null, "s3://x"' in page.text
    # Gain has a band for each group of several seeds and none for the single run.
    gain = html.partition("Gain: multi-source minus mono-source reward")[2].partition("</figure>")[0]
    assert gain.count('class="band"') == 2 and gain.count('class="line"') == 3 + 3  # lines and their marks in the legend


def test_curves_keep_to_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    folders = [finished_run(tmp_path / f"a{seed}", seed=seed, multi=0.5) for seed in (0, 1)]
    RunFolder(folders[1]).step(3, gain=9.0)
    gain = render(read_runs(folders)).partition("Gain: multi-source minus mono-source reward")[2].partition("</figure>")[0]
    assert "Steps 1 to 2; at the end all runs 0.500." in gain


def test_the_command_prints_a_table_writes_a_page_and_answers_json(
    folders: list[Path], tmp_path: Path, command_line: CommandLine
) -> None:
    names = list(map(str, folders))
    done = command_line("compare", *names, "--out", str(tmp_path / "page.html"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert rows.pop(0) == ["train.learning_rate", "0.001", "0.01"]
    assert rows[0] == ["Multi", "1", "3", "0.740 ± 0.099", "0.875 ± 0.000", ""]
    assert rows[1][:5] == ["", "2", "2", "0.810 ± 0.127", "0.875 ± 0.000"]  # 12.706 * 0.014142 / sqrt(2) = 0.127
    assert "1: seeds 0, 1, 2, last evaluations at step 2" in done.stdout
    assert (tmp_path / "page.html").is_file() and "no interval" not in done.stdout
    answer = json.loads(command_line("compare", *names, "--json").stdout)
    assert answer["groups"][1]["results"]["multi"]["final"]["n"] == 2
    assert answer["groups"][0]["runs"][0]["folder"] == names[0]
    alone = command_line("compare", names[0]).stdout
    assert "a recipe with one run has no interval" in alone and "what differs" not in alone
    moved = finished_run(tmp_path / "moved", seed=4, multi=0.5, sections={"weights": {"url": "\x1b[2J"}})
    assert (
        'weights.url is not the same in all runs, but tells no recipes apart: null, "\\u001b[2J"'
        in command_line("compare", names[0], str(moved)).stdout
    )


def test_a_run_that_is_not_there_is_refused(tmp_path: Path, command_line: CommandLine) -> None:
    done = command_line("compare", str(tmp_path / "gone"))
    assert done.returncode == 2 and "is no run folder" in done.stderr
    assert command_line("compare").returncode == 2
