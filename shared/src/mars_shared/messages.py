"""How a multi-source question is put to a model: chat messages with named images.

Pure, and used by whoever renders a prompt (replicas) or teaches a policy to read one (the
warm start), so that both see the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mars_shared.contracts import View

Messages = list[dict[str, Any]]


def build_messages(question: str, source_names: Sequence[str], *, only: str | None = None, view: View = View.SINGLE) -> Messages:
    """Chat messages in Hugging Face's format, and nothing of the images themselves.

    Args:
        question: the text that follows the images.
        source_names: all K sources in order.
        only: the one source of a mono-source rollout; None for multi-source.
        view: with `only`: SINGLE keeps that source's name and placeholder alone, REPEAT keeps
            the multi-source text, whose K placeholders will all show the one image.

    Example:
        build_messages("Which digit?", ["visible", "infrared"]) renders, with Qwen's template, as
        "visible: <image> infrared: <image> Which digit?"
    """
    shown = [only] if only is not None and view is View.SINGLE else list(source_names)
    content: list[dict[str, Any]] = []
    for name in shown:
        content.append({"type": "text", "text": f"{name}: "})
        content.append({"type": "image"})
        content.append({"type": "text", "text": " "})
    content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}]


def images_shown(source_names: Sequence[str], *, only: str | None = None, view: View = View.SINGLE) -> tuple[str, ...]:
    """Source names in placeholder order; REPEAT names the one source K times."""
    if only is None:
        return tuple(source_names)
    return (only,) if view is View.SINGLE else (only,) * len(source_names)
