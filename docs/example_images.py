"""Writes visible.png and infrared.png of a held-out digit into the current folder, and prints its answer."""

from pathlib import Path

from mars_trainer.datasets import load_dataset

sample = load_dataset("digits").test[3]
for name, data in sample.images.items():
    Path(f"{name}.png").write_bytes(data)
print(f"wrote {', '.join(f'{name}.png' for name in sample.images)}; {sample.question} {sample.truth.text}")
