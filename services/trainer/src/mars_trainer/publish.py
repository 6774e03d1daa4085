"""Publishes the policy's weights as an immutable snapshot that replicas pull."""

from __future__ import annotations

import torch
from torch import nn

from mars_shared.contracts import PolicyVersion, WeightManifest
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore, model_fingerprint
from mars_trainer.tensors import save_tensors

WEIGHTS_FILE = "model.safetensors"


def policy_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's parameters by Hugging Face name, tied ones once, contiguous, on the CPU."""
    return {
        name: parameter.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, parameter in model.named_parameters(remove_duplicate=True)
    }


class Publisher:
    """Writes versions into the weights store of one run."""

    def __init__(self, recipe: Recipe, store: WeightsStore) -> None:
        self._recipe = recipe
        self._store = store
        self._fingerprint = model_fingerprint(recipe.model.path)

    def publish(self, model: nn.Module, version: PolicyVersion) -> WeightManifest:
        """Write, fsync and announce a version, then remove the oldest ones."""
        dtype = getattr(torch, self._recipe.model.dtype)
        staged = self._store.stage()
        try:
            save_tensors(policy_tensors(model, dtype), staged / WEIGHTS_FILE)
            manifest = self._store.publish(
                staged,
                run=self._recipe.run.name,
                version=version,
                model=self._fingerprint,
                dtype=self._recipe.model.dtype,
            )
        except OSError:
            self._store.sweep()  # what did not fit must not keep room from the next attempt
            raise
        self._store.prune(self._recipe.train.keep_snapshots)
        return manifest

    def is_damaged(self) -> bool:
        """Whether a replica found the announced snapshot damaged, and it is: publishing it again mends it."""
        return self._store.is_damaged()
