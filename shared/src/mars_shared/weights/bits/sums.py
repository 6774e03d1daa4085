"""The checksums of a whole model's tensors, which follow every change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mars_shared.weights.bits.checksum import MODULUS, TensorSum, model_checksum, tensor_checksum
from mars_shared.weights.bits.kernels import Bits


class ModelSums(Mapping[str, TensorSum]):
    """Tensor name -> dtype, shape and checksum; two models with equal ones are the same bits.

    >>> sums = ModelSums()
    >>> sums.add("norm.weight", "bfloat16", (128,), bits)
    >>> encoded, change = encode(bits, new_bits)
    >>> sums.change("norm.weight", change) == tensor_checksum(new_bits)
    True
    """

    def __init__(self) -> None:
        self._tensors: dict[str, TensorSum] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], bits: Bits) -> None:
        """Take in a tensor, summed in full.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._tensors:
            raise ValueError(f"expected every tensor once, came {name} again")
        self._tensors[name] = TensorSum(dtype, shape, tensor_checksum(bits))

    def change(self, name: str, change: int) -> int:
        """Add what a change adds to a tensor's checksum; returns the checksum after it."""
        old = self._tensors[name]
        self._tensors[name] = replace(old, checksum=(old.checksum + change) % MODULUS)
        return self._tensors[name].checksum

    @property
    def checksum(self) -> str:
        """Of the whole model, as in `WeightIdentity.checksum`."""
        return model_checksum(self._tensors)

    def differing(self, other: ModelSums) -> list[str]:
        """Names of the tensors that only one of the two has, or that differ, sorted."""
        return sorted(name for name in self.keys() | other.keys() if self.get(name) != other.get(name))

    def __getitem__(self, name: str) -> TensorSum:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
