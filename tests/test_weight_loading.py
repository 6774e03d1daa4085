"""Loading into a model: rehearsed before a byte is written, and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mars_rollout.engine.environment import configure_environment
from mars_rollout.loading import differing_tensors, layout_of, load_tensors, read_tensors, rehearse
from rollout_fixtures import MAX_PIXELS

ROWS, SPARE = 6, 2


class Fused(nn.Module):
    """Loads as inference engines do: q and k into one parameter, rows beyond what fits cut off, an embedding with spare rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(2 * ROWS, 3), requires_grad=False)
        self.embed = nn.Parameter(torch.zeros(ROWS + SPARE, 3), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name == "embed":
                self.embed[: tensor.shape[0]].data.copy_(tensor)
                self.embed[tensor.shape[0] :].data.fill_(0)
            else:
                self.qk.data.narrow(0, ROWS * ["q", "k"].index(name), ROWS).copy_(tensor.narrow(0, 0, ROWS))
        return {"qk", "embed"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, 3, generator=random) for name in ("embed", "k", "q")}


def file_of(tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    save_file(tensors, path)
    return [str(path)]


def contents(model: Fused) -> torch.Tensor:
    return torch.cat([model.qk, model.embed])


def test_a_rehearsal_of_what_fits_passes_and_writes_nothing(tmp_path: Path) -> None:
    model, files = Fused(), file_of(tensors(), tmp_path / "file")
    rehearse(model, files)
    assert not contents(model).any()
    assert differing_tensors(model, files) == ["embed", "k", "q"]
    load_tensors(model, files)
    expected = tensors()
    assert torch.equal(contents(model), torch.cat([expected["q"], expected["k"], expected["embed"], torch.zeros(SPARE, 3)]))
    assert differing_tensors(model, files) == []


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "part of a fused parameter is missing": ({"k": None}, r"qk: 18 of 36"),
    "a parameter is missing": ({"embed": None}, r"embed: 0 of 24"),
    "a row that would be cut off": ({"q": torch.ones(ROWS + 1, 3)}, r"tensor q: 18 of its 21 elements find a place"),
    "a row that would be stretched": ({"q": torch.ones(ROWS, 1)}, r"tensor q: shape \(6, 1\) does not fit \(6, 3\)"),
    "too few rows": ({"q": torch.ones(ROWS - 1, 3)}, "exceeds dimension size"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_found_in_the_rehearsal(case: str, tmp_path: Path) -> None:
    changes, message = MISFITS[case]
    given = {name: tensor for name, tensor in (tensors() | changes).items() if tensor is not None}
    model = Fused()
    with pytest.raises((ValueError, RuntimeError), match=message):
        rehearse(model, file_of(given, tmp_path / "file"))
    assert not contents(model).any()


def test_a_byte_that_differs_anywhere_is_found_even_in_spare_rows(tmp_path: Path) -> None:
    model, files = Fused(), file_of(tensors(), tmp_path / "file")
    load_tensors(model, files)
    model.embed[-1, -1] = 1e-30
    assert differing_tensors(model, files) == ["embed"]
    load_tensors(model, files)
    model.qk[0, 0] += 1e-6
    assert differing_tensors(model, files) == ["q"]


class Core:
    """An engine's core with one worker, which holds a model; its first `failures` writes end after the first tensor."""

    def __init__(self, failures: int) -> None:
        self.model = Fused()
        self.label = "0.0"
        self._failures = failures
        self._active = False

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        assert self._active == (method != "start_weight_update"), method
        self._active = method == "start_weight_update"
        if kwargs is not None:
            self._receive(**kwargs["update_info"])
            self._active = True

    def _receive(self, files: list[str], mode: str) -> None:
        if mode == "rehearse":
            rehearse(self.model, files)
            return
        if self._failures:
            self._failures -= 1
            self.model.load_weights([next(iter(read_tensors(files)))])
            raise MemoryError("no room for the second tensor")
        load_tensors(self.model, files)

    def set_weight_version(self, label: str) -> None:
        self.label = label


@pytest.fixture(scope="module")
def transfer() -> ModuleType:
    """Imported as a replica imports it: vLLM reads its environment then."""
    configure_environment(threads=1, max_image_pixels=MAX_PIXELS)
    from mars_rollout import transfer

    return transfer


class EndedError(BaseException):
    """The process has ended."""


@pytest.mark.parametrize(
    "change", [{"q": torch.ones(ROWS, 4)}, {"q": torch.ones(ROWS, 3, dtype=torch.bfloat16)}, {"extra": torch.ones(1)}]
)
def test_the_layout_of_files_is_their_names_dtypes_and_shapes_and_no_values(change: dict[str, Any], tmp_path: Path) -> None:
    layout = layout_of(file_of(tensors(seed=0), tmp_path / "one"))
    assert layout == (("embed", "F32", (ROWS, 3)), ("k", "F32", (ROWS, 3)), ("q", "F32", (ROWS, 3)))
    assert layout_of(file_of(tensors(seed=1), tmp_path / "other")) == layout
    assert layout_of(file_of(tensors() | change, tmp_path / "changed")) != layout


@pytest.mark.engine
def test_a_layout_that_fits_is_rehearsed_once_and_another_one_again(transfer: ModuleType, tmp_path: Path) -> None:
    plugin = transfer.TensorTransfer.__new__(transfer.TensorTransfer)
    plugin.model = Fused()
    asked: list[str] = []
    load = plugin.model.load_weights
    plugin.model.load_weights = lambda weights: (asked.append("load"), load(weights))[1]

    def receive(tensors: dict[str, torch.Tensor]) -> int:
        asked.clear()
        plugin.receive_weights(transfer.TransferUpdate(file_of(tensors, tmp_path / "file"), transfer.REHEARSE))
        return len(asked)

    assert [receive(tensors(seed)) for seed in range(3)] == [1, 0, 0]
    for _ in range(2):
        with pytest.raises(ValueError, match="18 of its 21"):
            receive(tensors() | {"q": torch.ones(ROWS + 1, 3)})
    assert receive(tensors()) == 0 and not contents(plugin.model).any()


@pytest.mark.engine
def test_a_failure_in_mid_write_is_followed_by_a_whole_write(transfer: ModuleType, tmp_path: Path) -> None:
    core, files = Core(failures=1), file_of(tensors(), tmp_path / "file")
    seconds = transfer.apply_weights(core, files, "1.1")
    assert core.label == "1.1" and differing_tensors(core.model, files) == []
    assert set(seconds) == {"rehearse", "write", "pack"}


@pytest.mark.engine
def test_an_engine_whose_weights_cannot_be_written_whole_ends(
    transfer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(transfer.os, "_exit", end)
    monkeypatch.setattr(transfer.logging, "shutdown", lambda: None)
    core, files = Core(failures=2), file_of(tensors(), tmp_path / "file")
    with pytest.raises(EndedError, match=str(transfer.TORN_EXIT_CODE)):
        transfer.apply_weights(core, files, "1.1")
    assert differing_tensors(core.model, files) == ["k", "q"], "the mixture is there, and its process is not"
    assert core.label == "0.0"


@pytest.mark.engine
def test_what_does_not_fit_never_comes_to_a_write(transfer: ModuleType, tmp_path: Path) -> None:
    core, files = Core(failures=0), file_of({"embed": torch.ones(ROWS, 3)}, tmp_path / "file")
    refused = transfer.apply_weights(core, files, "1.1")
    assert isinstance(refused, str) and "qk: 0 of 36" in refused
    assert core.label == "0.0" and not contents(core.model).any()
