"""vLLM plugin: weights change in place, between two forward passes, in one step of the engine.

vLLM's own sequence (start, update, finish, set version) is four calls with forward passes in
between. Here `EngineCore.apply_snapshot` runs the whole sequence while nothing else runs, so
no token is ever sampled by half-written weights or labelled with the wrong version.

On CPU vLLM packs linear weights and drops the originals. The plugin keeps them, loads into
them, and packs again, the copy of a tied output layer included.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from mars_rollout.lifeline import die_with_parent

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

BACKEND = "mars"


def register() -> None:
    """Entry point of the plugin group vllm.general_plugins; vLLM calls it in each of its processes, maybe twice."""
    if multiprocessing.parent_process() is not None:
        die_with_parent()
    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, SnapshotTransfer.__name__)
    _keep_weights_on_cpu()

    from vllm.v1.engine.core import EngineCore

    EngineCore.apply_snapshot = apply_snapshot


def apply_snapshot(core: EngineCore, files: list[str], version: str) -> None:
    """Load safetensors files into every worker and set the version's label; runs inside the engine's loop."""
    core.collective_rpc("start_weight_update")
    core.collective_rpc("update_weights", kwargs={"update_info": {"files": files}})
    core.collective_rpc("finish_weight_update")
    core.set_weight_version(version)


@dataclass
class SnapshotInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand: a snapshot is a file."""


@dataclass
class SnapshotUpdate(WeightTransferUpdateInfo):
    """`files`: paths of verified safetensors files with Hugging Face tensor names."""

    files: list[str]


class SnapshotTransfer(WeightTransferEngine[SnapshotInit, SnapshotUpdate]):
    """Copies a snapshot's tensors into the model's parameters where they lie."""

    init_info_cls = SnapshotInit
    update_info_cls = SnapshotUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: SnapshotInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters keep their storage."""

    @torch.no_grad()
    def receive_weights(self, update_info: SnapshotUpdate) -> None:
        """Load every tensor, then pack.

        Raises:
            ValueError: the snapshot leaves a parameter as it was.
        """
        loaded = self.model.load_weights(read_tensors(update_info.files))
        missing = sorted(set(dict(self.model.named_parameters())) - set(loaded))
        if missing:
            raise ValueError(f"snapshot {update_info.files} has no values for {missing[:5]} ({len(missing)} parameters in all)")
        pack_cpu_weights(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left to do."""

    def shutdown(self) -> None:
        """Nothing to release."""


def read_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every tensor, one at a time."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a file, not a dict
                yield name, tensors.get_tensor(name)


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
