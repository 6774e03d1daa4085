"""What a model's own loader does with tensors from files: copy them, nothing, or compare.

Loaders of all architectures end in `Tensor.copy_` into a parameter or a part of one (fused projections,
shards), and in `Tensor.fill_` where a parameter has room to spare. Another meaning of both, for the time of a
load, needs no knowledge of where a tensor belongs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open

Write = Callable[[torch.Tensor, torch.Tensor | float], None]
"""What becomes of `target.copy_(source)` and of `target.fill_(number)`."""
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(Hugging Face name, dtype, shape) of every tensor of some files, in their order: all that a rehearsal depends on."""


def layout_of(files: Sequence[str]) -> Layout:
    """Read the heads of safetensors files."""
    return tuple(
        (name, part.get_dtype(), tuple(part.get_shape()))
        for tensors in opened(files)
        for name in tensors.keys()  # noqa: SIM118  # a file, not a dict
        for part in [tensors.get_slice(name)]
    )


def load_tensors(model: torch.nn.Module, files: Sequence[str]) -> None:
    """Write every tensor of the files into the model; `rehearse` says before whether they fit."""
    model.load_weights(read_tensors(files))  # type: ignore[operator]


def rehearse(model: torch.nn.Module, files: Sequence[str]) -> None:
    """Go through a whole load and write nothing.

    Raises:
        Exception: whatever the load would raise, of the loader's own classes.
        ValueError: a tensor finds no place for all of its elements, or a parameter no values for all of its own.
    """
    rehearsal = _Rehearsal()
    with writes_become(rehearsal.note):
        model.load_weights(rehearsal.noting_sizes(read_tensors(files)))  # type: ignore[operator]
    rehearsal.check(model)


def differing_tensors(model: torch.nn.Module, files: Sequence[str]) -> list[str]:
    """Hugging Face names of tensors whose bits in the model are not those of the files."""
    current, differing = "", []

    def noting_names() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal current
        for name, tensor in read_tensors(files):
            current = name
            yield name, tensor

    def compare(target: torch.Tensor, source: torch.Tensor | float) -> None:
        expected = torch.as_tensor(source).to(device=target.device, dtype=target.dtype).expand_as(target)
        if not torch.equal(_bits(target), _bits(expected)):
            differing.append(current)

    with writes_become(compare):
        model.load_weights(noting_names())  # type: ignore[operator]
    return list(dict.fromkeys(differing))


def read_tensors(files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every tensor, one at a time."""
    for tensors in opened(files):
        for name in tensors.keys():  # noqa: SIM118  # a file, not a dict
            yield name, tensors.get_tensor(name)


def opened(files: Sequence[str]) -> Iterator[Any]:
    """One safetensors file after another."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            yield tensors


@contextmanager
def writes_become(action: Write) -> Iterator[None]:
    """Let `target.copy_(source)` and `target.fill_(number)` in this thread do `action` instead."""
    copy, fill, thread = torch.Tensor.copy_, torch.Tensor.fill_, threading.get_ident()

    def acting(write: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def acted(target: torch.Tensor, source: torch.Tensor | float, *arguments: Any, **options: Any) -> torch.Tensor:
            if threading.get_ident() != thread:
                return write(target, source, *arguments, **options)
            action(target, source)
            return target

        return acted

    torch.Tensor.copy_ = acting(copy)  # type: ignore[method-assign]
    torch.Tensor.fill_ = acting(fill)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]
        torch.Tensor.fill_ = fill  # type: ignore[method-assign]


class _Rehearsal:
    """Counts elements: a loader may cut a tensor that is too large, and does not miss a part of a fused parameter."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._placed: Counter[str] = Counter()
        self._given: Counter[int] = Counter()
        """Elements by the address of their storage."""
        self._current = ""

    def noting_sizes(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._current, self._sizes[name] = name, tensor.numel()
            yield name, tensor

    def note(self, target: torch.Tensor, source: torch.Tensor | float) -> None:
        if isinstance(source, torch.Tensor):
            if source.shape != target.shape:
                raise ValueError(f"tensor {self._current}: shape {tuple(source.shape)} does not fit {tuple(target.shape)}")
            self._placed[self._current] += source.numel()
        self._given[_storage(target)] += target.numel()

    def check(self, model: torch.nn.Module) -> None:
        """Raise what found no place, or no values."""
        for name, size in self._sizes.items():
            if self._placed[name] != size:
                raise ValueError(f"tensor {name}: {self._placed[name]} of its {size} elements find a place in the model")
        incomplete = [
            f"{name}: {self._given[_storage(parameter)]} of {parameter.numel()}"
            for name, parameter in model.named_parameters()
            if self._given[_storage(parameter)] != parameter.numel()
        ]
        if incomplete:
            raise ValueError(f"not all parameters get values for all their elements ({len(incomplete)}; {incomplete[:5]})")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
