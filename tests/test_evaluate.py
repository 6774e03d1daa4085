"""Multi, Mono and Union by hand, the prompts that ask for them, and the samples that are kept."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from builders import V0, image_bytes, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Decoding, Purpose, Score, ScoredGroup, TextTruth
from mars_shared.errors import InputError, MediaTypeError
from mars_shared.settings import Recipe
from mars_shared.telemetry import EventLog, read_events
from mars_trainer import evaluate as evaluate_module
from mars_trainer.algorithm.bootstrap import mean_interval
from mars_trainer.datasets.base import Sample
from mars_trainer.dispatch import PromptMaker, place_of
from mars_trainer.evaluate import (
    Evaluation,
    metric_of,
    progress_events,
    read_results,
    result_of,
    summarise,
    summarise_by_dataset,
    write_results,
)

pytestmark = pytest.mark.usefixtures("clean_environment")


def answered(multi: float, mono: Mapping[str, float], *, index: int = 0, parsed: Sequence[bool] | None = None) -> ScoredGroup:
    """An evaluation group with these accuracies; its rewards are 0.5 more, for the format."""
    prompt = make_prompt(index, purpose=Purpose.EVAL, sources=tuple(mono), spec=sampling(1, 1, greedy=True))
    values = [multi, *mono.values()]
    flags = parsed or [True] * len(values)
    scores = [make_score(value + 0.5, accuracy=value, parsed=flag) for value, flag in zip(values, flags, strict=True)]
    return make_scored(make_group(prompt), scores)


def summarised(groups: Sequence[ScoredGroup]) -> Evaluation:
    return summarise([result_of(scored, "digits") for scored in groups])


def test_multi_mono_and_union_by_hand() -> None:
    result = summarised(
        [
            answered(1, {"visible": 0, "infrared": 0}),
            answered(0, {"visible": 1, "infrared": 0}),
            answered(1, {"visible": 0, "infrared": 1}),
            answered(0, {"visible": 1, "infrared": 1}),
            answered(0, {"visible": 0, "infrared": 0}),
        ]
    )
    # Union: per sample the best of the single sources: 0, 1, 1, 1, 0.
    assert (result.samples, result.multi, result.mono, result.union) == (5, 0.4, {"visible": 0.4, "infrared": 0.4}, 0.6)
    assert result.multi_minus_union == pytest.approx(-0.2)
    named = result.as_dict()
    assert set(named.pop("intervals")) == {"multi", "mono/visible", "mono/infrared", "union", "multi_minus_union"}
    assert named == {
        "samples": 5,
        "multi": 0.4,
        "mono": {"visible": 0.4, "infrared": 0.4},
        "union": 0.6,
        "parsed": 1.0,
        "correct": 0.4,
        "multi_minus_union": pytest.approx(-0.2),
    }


def test_unparseable_answers_count_as_wrong_and_stay_in_the_denominator() -> None:
    wrong = answered(0, {"visible": 0, "infrared": 0}, parsed=(False, False, True))
    result = summarised([answered(1, {"visible": 1, "infrared": 1}), wrong])
    assert (result.multi, result.union) == (0.5, 0.5)
    assert result.parsed == pytest.approx(4 / 6)


def test_a_source_counts_over_the_samples_that_have_it() -> None:
    result = summarised([answered(1, {"visible": 1, "infrared": 0}), answered(1, {"visible": 0, "depth": 1})])
    assert result.mono == {"visible": 0.5, "infrared": 0.0, "depth": 1.0}
    assert result.union == 1.0


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=6))
def test_no_single_source_beats_the_union(values: list[tuple[float, float, float]]) -> None:
    result = summarised([answered(m, {"visible": v, "infrared": i}) for m, v, i in values])
    assert result.union >= max(result.mono.values()) - 1e-9
    assert 0 <= result.multi <= 1 and result.multi_minus_union == result.multi - result.union


def test_intervals_are_of_paired_differences() -> None:
    """Multi is 0.25 below the union on every sample, however much both vary: no doubt about the difference."""
    groups = [answered(value, {"visible": value + 0.25, "infrared": 0}, index=i) for i, value in enumerate((0, 0.5, 0.75, 0.25))]
    result = summarised(groups)
    assert result.intervals["multi_minus_union"] == pytest.approx((-0.25, -0.25))
    low, high = result.intervals["multi"]
    assert low < result.multi < high
    assert result.intervals["mono/infrared"] == (0.0, 0.0)
    assert summarised(groups).intervals == result.intervals


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_an_interval_lies_within_the_values_and_around_their_mean(values: list[float]) -> None:
    low, high = mean_interval(values, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert mean_interval(values, resamples=200) == (low, high)


def test_an_interval_has_the_width_that_theory_gives() -> None:
    # 400 values, half 0 and half 1: standard error 0.5 / 20 = 0.025, so about 0.5 -+ 1.96 * 0.025.
    low, high = mean_interval([0.0, 1.0] * 200, resamples=4000)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_the_metric_is_accuracy_or_iou_and_never_the_format() -> None:
    assert metric_of(Score(reward=1.5, parts={"format": 0.5, "accuracy": 1.0}, parsed=True)) == 1.0
    assert metric_of(Score(reward=1.0, parts={"format": 0.75, "iou": 0.25}, parsed=True)) == 0.25
    with pytest.raises(KeyError):
        metric_of(Score(reward=0.75, parts={"format": 0.75}, parsed=True))


def test_an_evaluation_without_any_answer_is_an_error() -> None:
    with pytest.raises(InputError, match="not one sample was answered"):
        summarise([])


def test_every_dataset_gets_an_evaluation_of_its_own() -> None:
    groups = [answered(1, {"visible": 1}), answered(0, {"depth": 1}), answered(0, {"depth": 0})]
    results = [result_of(scored, name) for scored, name in zip(groups, ("llvip", "spatialqa", "spatialqa"), strict=True)]
    entry = summarise_by_dataset(results)
    assert entry["multi"] == pytest.approx(1 / 3) and list(entry["datasets"]) == ["llvip", "spatialqa"]
    assert entry["datasets"]["llvip"]["mono"] == {"visible": 1.0}
    assert (entry["datasets"]["spatialqa"]["multi"], entry["datasets"]["spatialqa"]["union"]) == (0.0, 0.5)


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = [result_of(answered(1, {"visible": 0}, index=index), "digits") for index in range(3)]
    write_results(tmp_path / "evaluations" / "step_0.jsonl", results)
    assert read_results(tmp_path / "evaluations" / "step_0.jsonl") == results
    assert results[1].prompt_id == "sample-1" and results[1].metric == "accuracy" and results[1].truth == "7"


def make_recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return Recipe.model_validate(
        {
            "run": {"name": "r", "dir": tmp_path, "seed": 7},
            "model": {"path": tmp_path, "max_model_len": 64},
            "data": {"dataset": "digits"},
            "rollout": {"num_generations": 4, "num_mono": 2, "max_completion_length": 8},
            "train": {"steps": 1, "prompts_per_step": 1, "learning_rate": 1e-3},
        }
    )


def make_sample(**images: bytes) -> Sample:
    return Sample(prompt_id="p-1", question="Which digit?", images=images, truth=TextTruth(text="7"))


def test_a_training_prompt_asks_what_the_recipe_says(tmp_path: Path) -> None:
    blobs, visible = BlobStore(tmp_path / "blobs"), image_bytes(format="JPEG")
    maker = PromptMaker(make_recipe(tmp_path), blobs)
    prompt = maker.training(make_sample(visible=visible, infrared=image_bytes()), epoch=3, dispatch_index=41, version=V0)
    assert (prompt.task_id, prompt.purpose, prompt.epoch, prompt.dispatch_index) == ("train-00000041", Purpose.TRAIN, 3, 41)
    assert (prompt.sampling.num_generations, prompt.sampling.num_mono, prompt.sampling.seed) == (4, 2, 7)
    assert prompt.policy_version == V0 and prompt.max_staleness == 0
    assert [(source.name, source.media_type) for source in prompt.sources] == [
        ("visible", "image/jpeg"),
        ("infrared", "image/png"),
    ]
    assert blobs.get(prompt.sources[0].blob) == visible


def test_an_issued_again_prompt_differs_in_its_version_alone(tmp_path: Path) -> None:
    maker = PromptMaker(make_recipe(tmp_path), BlobStore(tmp_path / "blobs"))
    sample = make_sample(visible=image_bytes())
    first, again = (
        maker.training(sample, epoch=0, dispatch_index=5, version=V0.model_copy(update={"incarnation": i})) for i in (1, 2)
    )
    assert first != again and first.model_copy(update={"policy_version": again.policy_version}) == again


def test_an_evaluation_prompt_asks_greedily_once_per_kind(tmp_path: Path) -> None:
    maker = PromptMaker(make_recipe(tmp_path), BlobStore(tmp_path / "blobs"))
    prompts = [maker.evaluation(make_sample(visible=image_bytes()), row=row, version=V0) for row in (0, 1)]
    assert prompts[0].purpose is Purpose.EVAL and prompts[0].task_id != prompts[1].task_id
    spec = prompts[0].sampling
    assert (spec.num_generations, spec.num_mono) == (1, 1)
    assert spec.multi_decoding is Decoding.GREEDY and spec.mono_decoding is Decoding.GREEDY


def test_a_dataset_image_of_another_type_is_refused_and_named(tmp_path: Path) -> None:
    maker = PromptMaker(make_recipe(tmp_path), BlobStore(tmp_path / "blobs"))
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "GIF")
    with pytest.raises(MediaTypeError, match="sample p-1, source 'infrared'"):
        maker.training(make_sample(visible=image_bytes(), infrared=gif.getvalue()), epoch=0, dispatch_index=0, version=V0)


def test_a_dataset_image_with_a_strange_source_name_is_refused(tmp_path: Path) -> None:
    maker = PromptMaker(make_recipe(tmp_path), BlobStore(tmp_path / "blobs"))
    with pytest.raises(ValidationError, match="name"):
        maker.training(make_sample(**{"<image>": image_bytes()}), epoch=0, dispatch_index=0, version=V0)


@given(rows=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own(rows: int, seed: int, epoch: int) -> None:
    places = [place_of(index, rows=rows, seed=seed) for index in range(epoch * rows, (epoch + 1) * rows)]
    assert {place.epoch for place in places} == {epoch}
    assert Counter(place.row for place in places) == Counter(range(rows))
    assert [place.row for place in places] == list(np.random.default_rng((seed, epoch)).permutation(rows))


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(place_of(epoch * 30 + position, rows=30, seed=seed).row for position in range(30))

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3 and order(0, 0) == order(0, 0)


def test_an_empty_training_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="training set is empty"):
        place_of(0, rows=0, seed=0)


def test_an_evaluation_under_way_says_how_far_it_is_every_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((10.0, 10.0, 11.0, 12.0))  # when it begins, and with 0, 3 and 9 answers
    monkeypatch.setattr(evaluate_module, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    on_progress = progress_events(EventLog(tmp_path / "events.jsonl"), step=40, samples=64)
    for answers in (0, 3, 9):
        on_progress(answers)
    events = read_events(tmp_path / "events.jsonl", "evaluating")
    assert [(event["step"], event["done"], event["samples"]) for event in events] == [(40, 0, 64), (40, 9, 64)]
