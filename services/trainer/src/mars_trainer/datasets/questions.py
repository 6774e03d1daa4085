"""Prompts of tables, as TRL and verl write them: a text, or a conversation that ends with the question."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from mars_shared.errors import InputError
from mars_trainer.datasets.marks import check_marks, count_marks, without_marks


class Part(BaseModel):
    """A part of a message: text, or the place of an image."""

    type: Literal["image", "text"]
    text: str | None = None


class Message(BaseModel):
    """A message of a conversation."""

    role: str
    content: str | list[Part]


def question_of(prompt: str | list[Message], images: int, where: str) -> str:
    """The question's text: what system messages say, then what the user asks, without places of images.

    System text becomes part of the question, since a multi-source prompt is one user message.

    Args:
        images: how many the row has; a prompt marks the places of all of them or of none.

    Raises:
        InputError: no text, another number of marks, or a conversation that is not system messages and one question.
    """
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    _check_roles([message.role for message in messages], where)
    contents = [_parts(message) for message in messages]
    marks = sum(_marks(part) for parts in contents for part in parts)
    if marks:
        check_marks(marks, images, f"{where}: prompt")
    texts = ["\n".join(filter(None, (without_marks(part.text or "") for part in parts))) for parts in contents]
    if not texts[-1]:
        raise InputError(f"{where}: prompt: no text; expected a question")
    return "\n".join(filter(None, texts))


def _check_roles(roles: list[str], where: str) -> None:
    if not roles or roles != ["system"] * (len(roles) - 1) + ["user"]:
        raise InputError(
            f"{where}: prompt: messages of {', '.join(roles) or 'nobody'}; expected system messages, if any, and one of user"
        )


def _parts(message: Message) -> list[Part]:
    return [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _marks(part: Part) -> int:
    return 1 if part.type == "image" else count_marks(part.text or "")
