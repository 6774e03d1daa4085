"""vLLM plugin: weights change in place, between two forward passes, in one step of the engine.

vLLM's own sequence (start, update, finish, set version) is four calls with forward passes in
between. Here `EngineCore.apply_weights` runs the whole sequence while nothing else runs, so
no token is ever sampled by half-written weights or labelled with the wrong version.

How tensors lie in the model is left to vLLM's own loader. It is rehearsed first, with copies that
copy nothing, so that tensors that don't fit are refused before a byte is written; and it compares, with
copies that compare, where somebody wants to know what the model holds (loading.py).

On CPU vLLM packs linear weights and drops the originals. The plugin keeps them, loads into
them, and packs again, the copy of a tied output layer included.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mars_rollout.lifeline import die_with_parent
from mars_rollout.loading import Layout, differing_tensors, layout_of, load_tensors, rehearse

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

logger = logging.getLogger(__name__)

BACKEND = "mars"
REHEARSE, LOAD, COMPARE = "rehearse", "load", "compare"
TORN_EXIT_CODE = 70
"""Of an engine that ends since it holds a mixture of two versions."""


def register() -> None:
    """Entry point of the plugin group vllm.general_plugins; vLLM calls it in each of its processes, maybe twice."""
    if multiprocessing.parent_process() is not None:
        die_with_parent()
    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, TensorTransfer.__name__)
    _keep_weights_on_cpu()

    from vllm.v1.engine.core import EngineCore

    EngineCore.apply_weights = apply_weights
    EngineCore.compare_weights = compare_weights


def apply_weights(core: EngineCore, files: list[str], version: str) -> dict[str, float] | str:
    """Load safetensors files into every worker and set the version's label; runs inside the engine's loop.

    Returns seconds by stage, "rehearse", "write" and "pack"; or why the tensors don't fit, and nothing was written.

    Raises:
        Exception: nobody knows which weights the engine holds. (After a failure in mid-write all is written again, and if
            that fails too the engine's process ends: a mixture never answers.)
    """
    began = time.perf_counter()
    core.collective_rpc("start_weight_update")
    try:
        _update(core, files, REHEARSE)
    except Exception as error:
        logger.exception("weights %s do not fit; nothing was written", version)
        return f"{type(error).__name__}: {error}"
    rehearsed = time.perf_counter()
    try:
        seconds = _write_and_pack(core, files)
    except Exception:
        logger.exception("writing weights %s failed; all tensors are written again", version)
        seconds = _write_again(core, files, version)
    core.set_weight_version(version)
    return {"rehearse": rehearsed - began, **seconds}


def compare_weights(core: EngineCore, files: list[str]) -> None:
    """Compare the weights of every worker with safetensors files, bit by bit.

    Raises:
        Exception: which tensors differ.
    """
    core.collective_rpc("start_weight_update")
    _update(core, files, COMPARE)
    core.collective_rpc("finish_weight_update")


def _update(core: EngineCore, files: list[str], mode: str) -> None:
    core.collective_rpc("update_weights", kwargs={"update_info": {"files": files, "mode": mode}})


def _write_and_pack(core: EngineCore, files: list[str]) -> dict[str, float]:
    began = time.perf_counter()
    _update(core, files, LOAD)
    written = time.perf_counter()
    core.collective_rpc("finish_weight_update")
    return {"write": written - began, "pack": time.perf_counter() - written}


def _write_again(core: EngineCore, files: list[str], version: str) -> dict[str, float]:
    try:
        core.collective_rpc("start_weight_update")
        return _write_and_pack(core, files)
    except Exception:
        logger.exception("weights %s cannot be written; the engine holds a mixture and ends", version)
        logging.shutdown()
        os._exit(TORN_EXIT_CODE)


@dataclass
class TransferInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand: tensors come from files."""


@dataclass
class TransferUpdate(WeightTransferUpdateInfo):
    """`files`: paths of verified safetensors files with Hugging Face tensor names; `mode`: what to do with them."""

    files: list[str]
    mode: str


class TensorTransfer(WeightTransferEngine[TransferInit, TransferUpdate]):
    """Copies tensors into the model's parameters where they lie."""

    init_info_cls = TransferInit
    update_info_cls = TransferUpdate
    supports_draft_weight_update = False
    _loaded = False
    _fitting: Layout | None = None
    """Of files that were rehearsed: others with the same layout fit as well."""

    def init_transfer_engine(self, init_info: TransferInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Parameters keep their storage."""
        self._loaded = False

    @torch.no_grad()
    def receive_weights(self, update_info: TransferUpdate) -> None:
        """Rehearse, load or compare every tensor; what is known to fit is not rehearsed again.

        Raises:
            ValueError: tensors and parameters do not fit, or differ.
        """
        if update_info.mode == REHEARSE:
            self._rehearse(update_info.files)
        elif update_info.mode == LOAD:
            load_tensors(self.model, update_info.files)
            self._loaded = True
        elif differing := differing_tensors(self.model, update_info.files):
            raise ValueError(f"{len(differing)} tensors of the model differ from {update_info.files}: {differing[:5]}")

    def _rehearse(self, files: list[str]) -> None:
        layout = layout_of(files)
        if layout != self._fitting:
            rehearse(self.model, files)
            self._fitting = layout

    def finish_weight_update(self) -> None:
        """Bring packed copies up to date."""
        if self._loaded:
            pack_cpu_weights(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def pack_cpu_weights(model: torch.nn.Module) -> None:
    """Bring the packed copies of linear weights up to date; modules have them on CPU alone."""
    from vllm.model_executor.layers import utils

    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            utils.dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _keep_weights_on_cpu() -> None:
    """Let vLLM pack linear weights for its CPU kernels, and keep the originals to load into."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> Any:
        return pack(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
