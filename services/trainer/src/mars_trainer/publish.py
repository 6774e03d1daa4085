"""Publishes versions of the policy's weights: what changed since the last one, and now and then all of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from mars_shared.contracts import PolicyVersion, WeightIdentity, WeightManifest, WeightsKind
from mars_shared.errors import NotReadyError, WeightsUnavailableError
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore, model_fingerprint
from mars_shared.weights.bits.checksum import TensorSum
from mars_shared.weights.bits.codec import EncodedTensor, Kind, encode
from mars_shared.weights.bits.delta import DeltaWriter, delta_meta
from mars_shared.weights.bits.kernels import Bits
from mars_shared.weights.bits.sums import ModelSums
from mars_shared.weights.bits.tensor_writer import write_tensors
from mars_trainer.upload import Uploader

logger = logging.getLogger(__name__)

SNAPSHOT_FILE, DELTA_FILE = "model.safetensors", "delta.mars"
_INTEGERS = {torch.float32: (torch.int32, np.uint32), torch.bfloat16: (torch.int16, np.uint16)}


class Publisher:
    """Writes versions into the weights store of one run.

    It keeps one copy of what was published, on the host and in the replicas' dtype. `encode` brings the copy to the
    model's weights tensor by tensor and writes down what changed; the parameters must stay as they are meanwhile.
    `announce` makes that durable and known; both may run beside whatever leaves the parameters alone.
    """

    def __init__(self, recipe: Recipe, store: WeightsStore) -> None:
        self._recipe = recipe
        self._store = store
        self._fingerprint = model_fingerprint(recipe.model.path)
        url = recipe.weights.url
        self._uploader = Uploader(store, url) if url and not url.startswith(("http://", "https://")) else None
        self._copy: dict[str, Bits] = {}
        self._sums = ModelSums()
        self._weights: WeightIdentity | None = None
        """Identity of the copy; None while it is no version's."""
        self._delta: StagedDelta | None = None
        """What leads to the copy's weights, if it is not announced yet."""

    def publish(self, model: nn.Module, version: PolicyVersion) -> WeightManifest:
        """Encode, announce and upload a version."""
        self.encode(model, version)
        manifest = self.announce()
        self.upload()
        return manifest

    def encode(self, model: nn.Module, version: PolicyVersion) -> None:
        """Take over the model's weights as those of a version that `announce` publishes."""
        base, self._weights, self._delta = self._weights, None, None
        if base is None:
            self._take_copy(model)
        else:
            self._delta = StagedDelta(self._store, base, version)
            self._update_copy(model, self._delta)
        self._weights = WeightIdentity(
            run=self._recipe.run.name,
            version=version,
            model=self._fingerprint,
            dtype=self._recipe.model.dtype,
            checksum=self._sums.checksum,
        )
        if base is None and (same := self._same_bits(self._weights)):
            self._delta = StagedDelta(self._store, same, version)
        if self._delta is not None:
            self._delta.close()

    def announce(self) -> WeightManifest:
        """Publish what was encoded, as a delta where that pays, and a snapshot where one is due.

        Raises:
            OSError: the disk is full, say; nothing is lost, call it again.
            FencedError: another trainer has taken over.
        """
        weights, delta = self._held(), self._delta
        self._delta = None  # whatever happens to it, a snapshot does as well
        manifest = self._announced(weights)  # by an earlier call, which failed afterwards
        if manifest is None and delta is not None and delta.pays(self._snapshot_bytes):
            manifest = delta.publish(weights)
        if manifest is None or self._snapshot_is_due():
            snapshot = self._publish_snapshot(announce=manifest is None)
            manifest = manifest or snapshot
        if self._uploader is None:
            self._store.prune(self._recipe.weights.keep_snapshots)
        return manifest

    def upload(self) -> None:
        """Bring what was announced to the URL that the recipe names, if it does, and remove what no reader needs.

        Raises:
            WeightsUnavailableError: it does not answer; call it again.
            ConfigError, FencedError: the URL holds other weights.
        """
        if self._uploader is not None:
            self._uploader.collect()
            self._store.prune(self._recipe.weights.keep_snapshots)
            self._uploader.upload()

    def mend(self) -> WeightManifest:
        """Publish a snapshot of what is announced, for `upload` to bring on its way: a reader found that nothing leads there."""
        return self._publish_snapshot(announce=True)

    def needs_upload(self) -> bool:
        """Whether readers of the recipe's URL found something damaged there that is whole here; known after `needs_snapshot`."""
        return self._uploader is not None and self._uploader.lacking

    def needs_snapshot(self) -> bool:
        """Whether a reader complained that it cannot reach the announced version, and rightly. Asks the recipe's URL."""
        if self._uploader is not None:
            try:
                self._uploader.collect()
            except WeightsUnavailableError as error:
                logger.warning("%s", error)
        return self._store.needs_snapshot()

    def _take_copy(self, model: nn.Module) -> None:
        self._copy, self._sums = {}, ModelSums()
        for name, tensor in policy_tensors(model, self._dtype):
            self._copy[name] = bits_of(tensor).copy()
            self._sums.add(name, self._recipe.model.dtype, tuple(tensor.shape), self._copy[name])

    def _update_copy(self, model: nn.Module, delta: StagedDelta) -> None:
        for name, tensor in policy_tensors(model, self._dtype):
            encoded, change = encode(self._copy[name], bits_of(tensor), update=True)
            if encoded is not None:
                self._sums.change(name, change)
                delta.add(name, self._sums[name], encoded)

    def _same_bits(self, weights: WeightIdentity) -> WeightManifest | None:
        """What a trainer before this one published of the same weights."""
        same = [
            manifest
            for manifest in self._store.manifests()
            if (manifest.run, manifest.model, manifest.dtype) == (weights.run, weights.model, weights.dtype)
            and manifest.checksum == weights.checksum
        ]
        return same[-1] if same else None

    def _publish_snapshot(self, *, announce: bool) -> WeightManifest:
        staged = self._store.stage()
        try:
            write_tensors(staged / SNAPSHOT_FILE, ((name, self._sums[name], bits) for name, bits in self._copy.items()))
            return self._store.publish(staged, identity=self._held(), kind=WeightsKind.SNAPSHOT, announce=announce)
        except OSError:
            self._store.sweep()  # what did not fit must not keep room from the next attempt
            raise

    def _announced(self, weights: WeightIdentity) -> WeightManifest | None:
        head = self._store.head_to_replace()
        return head if head is not None and head.weights_id == weights.weights_id else None

    def _snapshot_is_due(self) -> bool:
        """Whether so many deltas follow the newest snapshot that a newcomer would read too much."""
        manifests = self._store.manifests()
        snapshots = [index for index, manifest in enumerate(manifests) if manifest.kind is WeightsKind.SNAPSHOT]
        chain = manifests[snapshots[-1] + 1 :] if snapshots else manifests
        return (
            not snapshots
            or len(chain) >= self._recipe.weights.snapshot_every
            or sum(manifest.size_bytes for manifest in chain) > self._snapshot_bytes
        )

    def _held(self) -> WeightIdentity:
        if self._weights is None:
            raise NotReadyError("no version is encoded: its encoding failed, or there was none yet")
        return self._weights

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._recipe.model.dtype)
        return dtype

    @property
    def _snapshot_bytes(self) -> int:
        return sum(bits.nbytes for bits in self._copy.values())


class StagedDelta:
    """A delta that is written tensor by tensor; a disk that is full makes it worthless and stops nobody."""

    def __init__(self, store: WeightsStore, base: WeightIdentity, version: PolicyVersion) -> None:
        self._store = store
        self._base = base
        self._folder = store.stage()
        self._file = (self._folder / DELTA_FILE).open("wb")
        self._failure: OSError | None = None
        self._invertible = True
        self._writer = DeltaWriter(self._file, delta_meta(base, version))

    def add(self, name: str, after: TensorSum, encoded: EncodedTensor) -> None:
        """One tensor's change; `after` describes the changed tensor."""
        self._invertible = self._invertible and encoded.kind is Kind.DELTA
        if self._failure is None:
            try:
                self._writer.add(name, after.dtype, after.shape, encoded, after.checksum)
            except OSError as error:
                self._failure = error

    def close(self) -> None:
        """All tensors are there."""
        try:
            if self._failure is None:
                self._writer.close()
            self._file.close()
        except OSError as error:
            self._failure = error
        if self._failure is not None:
            logger.warning("the delta from %s cannot be written (%s); a snapshot will do", self._base.version, self._failure)
            self._store.sweep()

    def pays(self, snapshot_bytes: int) -> bool:
        """Whether it is there and costs less than a snapshot."""
        return self._failure is None and (self._folder / DELTA_FILE).stat().st_size < snapshot_bytes

    def publish(self, weights: WeightIdentity) -> WeightManifest:
        """Make it known as the way to these weights."""
        try:
            return self._store.publish(
                self._folder, identity=weights, kind=WeightsKind.DELTA, base=self._base, invertible=self._invertible
            )
        except OSError:
            self._store.sweep()
            raise


def policy_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters by Hugging Face name, tied ones once, contiguous, on the CPU; shards are gathered one by one."""
    for name, parameter in model.named_parameters(remove_duplicate=True):
        tensor = parameter.detach()
        if hasattr(tensor, "full_tensor"):  # a shard of FSDP's; every rank must come here
            tensor = tensor.full_tensor()
        yield name, tensor.to(device="cpu", dtype=dtype).contiguous()


def bits_of(tensor: torch.Tensor) -> Bits:
    """A contiguous tensor's bits as a flat array of unsigned integers; the memory is shared."""
    signed, unsigned = _INTEGERS[tensor.dtype]
    return tensor.view(-1).view(signed).numpy().view(unsigned)
