"""Pictures of a run: curves over steps, and groups with their images, answers and boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mars_shared.blobs import BlobStore
from mars_shared.contracts import BoxesTruth, Kind
from mars_shared.images import open_image
from mars_shared.records.groups import AnswerRecord, GroupRecord
from mars_shared.telemetry import by_step
from mars_trainer.datasets.records import Record
from mars_trainer.readable import readable

_MAX_PIXELS = 2**26
_SMOOTHED_STEPS = 10


def draw_curves(events: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Reward, gain and conflicts, held-out results and where the time went, over steps."""
    steps, evaluations = by_step(events, "step"), by_step(events, "evaluation")
    figure, ((reward, gain), (held_out, time)) = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    figure.suptitle(title)
    reward.set_ylabel("reward of multi-source answers")
    gain.set_ylabel("gain; share of groups")
    _plot_metrics(reward, steps, {"reward": "multi-source reward"})
    _plot_metrics(
        gain,
        steps,
        {
            "gain": "gain: multi minus mono reward",
            "conflict_rate": "conflicts: gain < 0",
            "promotion_rate": "promotions: gain > 0",
        },
    )
    gain.axhline(0, color="grey", linewidth=0.8)
    _plot_evaluations(held_out, evaluations)
    time.stackplot(
        [step["step"] for step in steps],
        [[step["seconds"][stage] for step in steps] for stage in steps[0]["seconds"]],
        labels=[stage.replace("_", " ") for stage in steps[0]["seconds"]],
    )
    time.set_ylabel("seconds a step")
    for axes in (reward, gain, held_out, time):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_metrics(axes: Axes, steps: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    for name, label in names.items():
        points = [(step["step"], step["metrics"][name]) for step in steps if name in step["metrics"]]
        if points:
            x, y = zip(*points, strict=True)
            (line,) = axes.plot(x, y, alpha=0.25, linewidth=0.8)
            axes.plot(x, _smooth(y), label=label, color=line.get_color())


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last _SMOOTHED_STEPS values at each point."""
    windows = [values[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _plot_evaluations(axes: Axes, evaluations: Sequence[dict[str, Any]]) -> None:
    x = [event["step"] for event in evaluations]
    axes.plot(x, [event["multi"] for event in evaluations], "o-", label="Multi")
    axes.plot(x, [event["union"] for event in evaluations], "s--", label="Union")
    for name in evaluations[0]["mono"]:
        axes.plot(x, [event["mono"][name] for event in evaluations], ".:", label=f"Mono {name}")
    axes.set_ylabel("held-out accuracy or mIoU")
    axes.set_ylim(0, 1)


def draw_groups(groups: Sequence[GroupRecord], blobs: BlobStore, target: Path | BinaryIO, *, title: str) -> None:
    """One row a group: each source with the answers it led to; true boxes green, answered ones red. Written as PNG.

    Any thread may call it, one at a time: nothing of pyplot is used, whose figures belong to the process.
    """
    columns = max(len(group.sources) for group in groups) + 1
    figure = Figure(figsize=(3.2 * columns, 2.9 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), columns, squeeze=False)
    boxes = any(isinstance(group.truth, BoxesTruth) for group in groups)
    figure.suptitle(f"{title}; the number is an answer's reward" + ("; true boxes green, answered ones red" if boxes else ""))
    for axes, group in zip(grid, groups, strict=True):
        _draw_group(axes, group, blobs)
    figure.savefig(target, dpi=90, format="png")


def _draw_group(axes: Sequence[Axes], group: GroupRecord, blobs: BlobStore) -> None:
    for axis in axes:
        axis.axis("off")
    for axis, source in zip(axes, group.sources, strict=False):
        image = open_image(blobs.get(source.blob), what=f"{group.prompt_id}, {source.name}", max_pixels=_MAX_PIXELS)
        axis.imshow(image)
        answers = _answers(group, Kind.MONO, source.name)
        axis.set_title(_caption(source.name, answers), fontsize=7)
        _draw_boxes(axis, group, answers[:1])
    last = axes[len(group.sources)]
    images = [open_image(blobs.get(source.blob), what=group.prompt_id, max_pixels=_MAX_PIXELS) for source in group.sources]
    last.imshow(_blended(images))
    answers = _answers(group, Kind.MULTI, None)
    last.set_title(_caption("all sources", answers) + f"\n{_truth(group)}", fontsize=7)
    _draw_boxes(last, group, answers[:1])


def _blended(images: Sequence[Image.Image]) -> Image.Image:
    """The mean of all images, at the first one's size."""
    same = [np.asarray(image.resize(images[0].size), dtype=np.float32) for image in images]
    return Image.fromarray(np.mean(same, axis=0).astype(np.uint8))


def _answers(group: GroupRecord, kind: Kind, source: str | None) -> list[AnswerRecord]:
    return [answer for answer in group.answers if answer.kind is kind and answer.source == source]


def _caption(name: str, answers: Sequence[AnswerRecord]) -> str:
    lines = [name]
    for answer in answers[:2]:
        text = textwrap.shorten(readable(answer.text, 200).replace("$", r"\$"), 120, placeholder="...")
        lines += textwrap.wrap(f"{answer.reward:.2f}: {text}", 52)
    return "\n".join(lines)


def _truth(group: GroupRecord) -> str:
    truth = group.truth
    if truth is None or truth.kind != "text":
        return "truth: green boxes"
    return f"truth: {textwrap.shorten(readable(truth.text, 200), 120, placeholder='...')}".replace("$", r"\$")


def _draw_boxes(axis: Axes, group: GroupRecord, answers: Sequence[AnswerRecord]) -> None:
    if not isinstance(group.truth, BoxesTruth):
        return
    for box in group.truth.boxes:
        _rectangle(axis, box, "lime")
    for answer in answers:
        for box in answer.boxes:
            _rectangle(axis, box, "red")


def draw_records(records: Sequence[tuple[Record, Sequence[bytes]]], path: Path, *, title: str) -> None:
    """A contact sheet: one row a question, its images side by side, true boxes green on the first."""
    columns = max(len(images) for _, images in records)
    figure, grid = plt.subplots(
        len(records), columns, figsize=(3.2 * columns, 2.9 * len(records)), squeeze=False, constrained_layout=True
    )
    figure.suptitle(title)
    for axes, (record, images) in zip(grid, records, strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, image, data in zip(axes, record.images, images, strict=False):
            axis.imshow(open_image(data, what=record.where, max_pixels=_MAX_PIXELS))
            axis.set_title(image.name, fontsize=7)
        answer = record.answer if isinstance(record.answer, str) else f"{len(record.answer)} boxes"
        axes[0].set_title("\n".join(textwrap.wrap(f"{record.question} {answer}".replace("$", r"\$"), 52)[:4]), fontsize=7)
        if not isinstance(record.answer, str):
            for box in record.answer:
                _rectangle(axes[0], box, "lime")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _rectangle(axis: Axes, box: Sequence[float], colour: str) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.2))
