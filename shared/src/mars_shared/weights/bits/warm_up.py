"""Compiles the loops of the codec before they are needed: seconds once a machine, then they are on its disk."""

from __future__ import annotations

import numpy as np

from mars_shared.weights.bits.checksum import tensor_checksum
from mars_shared.weights.bits.codec import apply, encode, undo

WIDTHS = (np.uint16, np.uint32)
"""Of bfloat16 and float32."""


def compile_codec() -> None:
    """Encode, apply and undo a change of a few elements in each width."""
    for width in WIDTHS:
        old, new = np.zeros(256, width), np.zeros(256, width)
        new[7] = 1
        frozen = new.view()
        frozen.flags.writeable = False
        for changed in (new, frozen):
            encoded, _ = encode(old.copy(), changed, update=True)
            assert encoded is not None
            apply(old, encoded)
            undo(old, encoded)
            tensor_checksum(changed)
