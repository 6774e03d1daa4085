"""One group that lost to a source: all sources side by side, boxes, what was answered with all of them and from the winner alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mars_shared.blobs import BlobStore
from mars_shared.contracts import FinishReason, Source
from mars_shared.contracts.prompt import Box, BoxesTruth
from mars_shared.records.groups import AnswerRecord, GroupRecord
from mars_shared.report.markup import Markup, join, said, tag
from mars_shared.report.numbers import number, signed
from mars_shared.report.pictures import UNUSABLE, data_uri

SHOWN_ANSWERS = 3
"""With all sources, and with each alone: their texts and boxes."""
QUESTION_CHARACTERS = 600


def group_view(group: GroupRecord, blobs: BlobStore, winner: str) -> Markup:
    """A group whose reward from `winner` alone is above that from all sources."""
    together, alone = _answers(group, None), _answers(group, winner)
    return tag(
        "article",
        tag("h4", tag("bdi", group.prompt_id), f", step {group.step}: ", _deficit(group, winner)),
        tag("p", said(group.question, limit=QUESTION_CHARACTERS), _truth(group), class_="question"),
        tag(
            "div",
            tag("div", _sources(group, blobs, winner), _legend(group)),
            tag("div", _side("All sources together", together, "multi"), _side(f"{winner} alone", alone, "mono"), class_="sides"),
            class_="looked-at",
        ),
        class_="group",
    )


def _deficit(group: GroupRecord, winner: str) -> Markup:
    return tag("span", f"gain over {winner} {signed(group.gain_by_source[winner])}", class_="conflict")


def _truth(group: GroupRecord) -> Markup | None:
    if group.truth is None:
        return None
    if isinstance(group.truth, BoxesTruth):
        count = len(group.truth.boxes)
        return join([f" {count} true {'box' if count == 1 else 'boxes'}."])
    return join([" Truth: ", tag("b", said(group.truth.text, limit=QUESTION_CHARACTERS))])


def _answers(group: GroupRecord, source: str | None) -> list[AnswerRecord]:
    return [answer for answer in group.answers if answer.source == source]


def _sources(group: GroupRecord, blobs: BlobStore, winner: str) -> Markup:
    return tag("div", *(_source(group, source, blobs, winner) for source in group.sources), class_="sources")


def _source(group: GroupRecord, source: Source, blobs: BlobStore, winner: str) -> Markup:
    alone = _answers(group, source.name)
    reward = f": alone {number(fmean(answer.reward for answer in alone))}" if alone else ""
    name = tag("b", source.name) if source.name == winner else join([source.name])
    return tag("figure", _frame(group, source, blobs), tag("figcaption", name, reward), class_="source")


def _frame(group: GroupRecord, source: Source, blobs: BlobStore) -> Markup:
    """The image, with boxes drawn over it in its original pixels."""
    try:
        uri = data_uri(blobs, source)
    except UNUSABLE as error:
        return tag("div", tag("b", "The image is missing."), " ", said(str(error), limit=300), class_="missing")
    image = tag("img", src=uri, alt=f"source {source.name}")
    return tag("div", image, _boxes(group, source), class_="frame")


def _boxes(group: GroupRecord, source: Source) -> Markup | None:
    if not isinstance(group.truth, BoxesTruth):
        return None
    marks = _rectangles(group.truth.boxes, "truth")
    for answer in (*_answers(group, None)[:SHOWN_ANSWERS], *_answers(group, source.name)[:SHOWN_ANSWERS]):
        marks += _rectangles(answer.boxes, answer.kind.value)
    view = f"0 0 {group.truth.width_px} {group.truth.height_px}"
    return tag("svg", tag("title", f"boxes in {source.name}"), *marks, viewBox=view, preserveAspectRatio="none", role="img")


def _rectangles(boxes: Sequence[Box], kind: str) -> list[Markup]:
    return [
        tag("rect", x=x1, y=y1, width=max(x2 - x1, 0), height=max(y2 - y1, 0), class_=kind, vector_effect="non-scaling-stroke")
        for x1, y1, x2, y2 in boxes
    ]


def _legend(group: GroupRecord) -> Markup | None:
    if not isinstance(group.truth, BoxesTruth):
        return None
    kinds = (("truth", "true boxes"), ("multi", "answered with all sources"), ("mono", "answered from that source alone"))
    keys = [
        tag(
            "li",
            tag("svg", tag("rect", x=2, y=2, width=18, height=8, class_=kind), viewBox="0 0 22 12", class_="swatch"),
            f" {name}",
        )
        for kind, name in kinds
    ]
    return tag("ul", *keys, class_="legend boxes")


def _side(title: str, answers: Sequence[AnswerRecord], kind: str) -> Markup:
    mean = f"mean reward {number(fmean(answer.reward for answer in answers))}, answers: {len(answers)}"
    rest = len(answers) - SHOWN_ANSWERS
    more = tag("p", f"and {rest} more answers", class_="note") if rest > 0 else None
    shown = [_answer(answer) for answer in answers[:SHOWN_ANSWERS]]
    return tag("section", tag("h5", title), tag("p", mean, class_="note"), *shown, more, class_=f"side {kind}")


def _answer(answer: AnswerRecord) -> Markup:
    parts = [f"{name} {number(value, 2)}" for name, value in answer.parts.items()]
    parts += [] if answer.parsed else ["not readable"]
    parts += ["cut off"] if answer.finish_reason is FinishReason.LENGTH else []
    facts = [tag("strong", number(answer.reward)), *(tag("span", part, class_="part") for part in parts)]
    return tag("div", tag("p", *facts, class_="facts"), tag("p", said(answer.text), class_="said"), class_="answer")
