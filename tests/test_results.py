"""The table of an evaluation: each dataset and view by hand, and by the released script's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mars_reward.rewards.released_eval import released_eval
from mars_shared.contracts import BoxesTruth, ReleasedEval
from mars_shared.telemetry import EventLog
from mars_trainer.evaluate import Result, SampleResult, read_results, write_results
from mars_trainer.results import main, markdown, result_rows
from reference_data import needs_reference_data, reference

pytestmark = pytest.mark.usefixtures("clean_environment")

RECIPE = """
[run]
name = "test"
dir = "{dir}"
[model]
path = "models/tiny"
max_model_len = 64
[data]
dataset = "scene"
[rollout]
num_generations = 1
max_completion_length = 8
[train]
steps = 2
prompts_per_step = 1
learning_rate = 1e-3
"""


def answer(value: float, released: float | None = None) -> Result:
    said = ReleasedEval(value=released, correct=released is not None and released > 0.5)
    return Result(value=value, parsed=released is not None, completion="", released=said)


def sample(multi: Result, dataset: str = "llvip", **mono: Result) -> SampleResult:
    return SampleResult(dataset=dataset, prompt_id="p", question="?", truth="7", metric="iou", multi=multi, mono=mono)


LLVIP = [
    sample(answer(0.75, 0.75), visible=answer(0.25, 0.25), infrared=answer(0.5, 0.5)),
    sample(answer(0.0, None), visible=answer(1.0, 1.0), infrared=answer(0.0, None)),
]


def test_means_are_over_all_samples_unparseable_ones_included() -> None:
    rows = {row.view: row for row in result_rows(LLVIP)}
    assert {view: row.mean for view, row in rows.items()} == {
        "multi": 0.375,  # (0.75 + 0) / 2
        "mono/visible": 0.625,
        "mono/infrared": 0.25,
        "union": 0.75,  # (0.5 + 1) / 2
        "multi_minus_union": -0.375,
    }
    assert (rows["multi"].samples, rows["multi"].correct, rows["multi"].parsed) == (2, 0.5, 0.5)
    assert rows["multi"].interval == (0.0, 0.75)


def test_the_released_arithmetic_drops_what_its_script_cannot_parse() -> None:
    rows = {row.view: row for row in result_rows(LLVIP, released=True)}
    assert (rows["multi"].samples, rows["multi"].mean, rows["multi"].correct) == (1, 0.75, 1.0)
    assert (rows["mono/infrared"].samples, rows["mono/infrared"].mean, rows["mono/infrared"].correct) == (1, 0.5, 0.0)
    # Union: 0.5, and 1.0 of the one source that is left; the difference is over the first sample alone.
    assert rows["union"].mean == 0.75
    assert (rows["multi_minus_union"].samples, rows["multi_minus_union"].mean) == (1, 0.25)


def test_several_datasets_stand_apart_and_their_mean_counts_each_once() -> None:
    rows = result_rows([*LLVIP, sample(answer(1, 1), "spatialqa", depth=answer(0, 0))])
    assert [row.dataset for row in rows] == ["llvip"] * 5 + ["spatialqa"] * 4 + ["mean of datasets"]
    assert rows[-1].mean == pytest.approx((0.375 + 1) / 2)


def test_a_view_of_which_every_sample_is_dropped_has_no_mean() -> None:
    rows = result_rows([sample(answer(0, None), visible=answer(0, None))], released=True)
    assert [(row.samples, row.mean) for row in rows] == [(0, None)] * 4
    assert "| llvip | Multi | 0 | mIoU |  |  |  | 0.000 |" in markdown(rows, "title")


def test_the_command_shows_the_newest_evaluation_and_writes_it_as_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dir=tmp_path))
    log = EventLog(tmp_path / "events.jsonl")
    log.write("evaluation", step=2, results="step_2.jsonl", asked={"llvip": 2})
    log.write("evaluated", step=2, results="eval_step_2.jsonl", asked={"llvip": 3, "scene": 1})
    write_results(tmp_path / "evaluations" / "eval_step_2.jsonl", LLVIP)
    assert main(["--recipe", str(tmp_path / "recipe.toml")]) == 0
    assert "Mono infrared" in capsys.readouterr().out
    page = (tmp_path / "evaluations" / "eval_step_2.md").read_text()
    assert page.startswith("# test after step 2: held-out samples, greedy\n")
    assert "llvip: 1 of 3 samples were not answered" in page and "scene: 1 of 1 samples were not answered" in page
    assert "| llvip | Multi | 2 | mIoU | 0.375 | 0.000 to 0.750 | 0.500 | 0.500 |" in page
    assert main(["--recipe", str(tmp_path / "recipe.toml"), "--released"]) == 0
    assert "| llvip | Multi | 1 | mIoU | 0.750 |" in (tmp_path / "evaluations" / "eval_step_2-released.md").read_text()


def test_a_line_of_results_ends_at_its_line_feed_alone(tmp_path: Path) -> None:
    result = sample(Result(value=1, parsed=True, completion="a\u2028b\u0085c\nd"), visible=answer(1))
    write_results(tmp_path / "step_0.jsonl", [result])
    assert read_results(tmp_path / "step_0.jsonl") == [result]


def test_a_run_without_an_evaluation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dir=tmp_path))
    assert main(["--recipe", str(tmp_path / "recipe.toml")]) == 2
    assert "has no evaluation" in capsys.readouterr().err


@needs_reference_data
def test_the_released_mean_is_that_of_the_golden_rows() -> None:
    golden = reference("golden_rewards.json")["grounding"]
    results = []
    for row in golden:
        truth = BoxesTruth(boxes=tuple(map(tuple, row["ground_truth"])), width_px=4096, height_px=4096)
        found = Result(value=0, parsed=True, completion=row["completion"], released=released_eval(row["completion"], truth))
        assert found.released is not None
        assert found.released.value == (None if row["eval_miou"] is None else pytest.approx(row["eval_miou"], abs=1e-9))
        results.append(sample(found, visible=found))
    kept = [row["eval_miou"] for row in golden if row["eval_miou"] is not None]
    multi = result_rows(results, released=True)[0]
    assert multi.samples == len(kept) < len(golden)
    assert multi.mean == pytest.approx(sum(kept) / len(kept), abs=1e-9)
    assert multi.correct == pytest.approx(sum(value > 0.5 for value in kept) / len(kept))
    assert json.loads(results[0].model_dump_json())["multi"]["released"] is not None


def test_json_has_every_row_of_the_table_and_nothing_else_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(dir=tmp_path))
    EventLog(tmp_path / "events.jsonl").write("evaluated", step=2, results="eval_step_2.jsonl", asked={"llvip": 3})
    write_results(tmp_path / "evaluations" / "eval_step_2.jsonl", LLVIP)
    assert main(["--recipe", str(tmp_path / "recipe.toml"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["run"], said["step"], said["released"], said["asked"]) == ("test", 2, False, {"llvip": 3})
    assert said["samples"].endswith("eval_step_2.jsonl") and Path(said["table"]).is_file()
    multi = said["results"][0]
    assert (multi["dataset"], multi["view"], multi["samples"], multi["mean"]) == ("llvip", "multi", 2, 0.375)
    assert multi["interval"] == [0.0, 0.75]
