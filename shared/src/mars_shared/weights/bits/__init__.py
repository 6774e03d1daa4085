"""Tensors as integers: checksums, deltas and files of them. Needs the extra `mars-shared[weights]`."""
