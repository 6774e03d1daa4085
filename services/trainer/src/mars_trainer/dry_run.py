"""`mars train RECIPE --dry-run`: the resolved run, the memory it needs and its first prompt; nothing is started."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mars_shared.errors import MarsError
from mars_shared.frames import resolved_box_frame
from mars_shared.images import open_image
from mars_shared.model_folder import check_model_folder
from mars_shared.settings import Recipe, load_recipe
from mars_shared.trackers import check_trackers
from mars_shared.weights import open_source
from mars_trainer.datasets import RunData, open_data
from mars_trainer.datasets.base import Sample
from mars_trainer.datasets.prompt_length import PromptRuler
from mars_trainer.dispatch import place_of
from mars_trainer.memory import ModelShape, model_shape, needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Print as much as can be known; returns the exit code, which is that of what is missing or wrong."""
    parser = argparse.ArgumentParser(prog="mars_trainer.dry_run", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    try:
        for part in dry_run(load_recipe(parser.parse_args(arguments).recipe)):
            sys.stdout.write(f"{part}\n\n")
    except MarsError as error:
        sys.stdout.flush()
        sys.stderr.write(f"mars: {error}\n")
        return error.exit_code
    return 0


def dry_run(recipe: Recipe) -> Iterator[str]:
    """The parts of the answer, each once it is known.

    Raises:
        ConfigError: the model folder, the URL of the weights, a tracker or the data cannot be used.
        InputError: the first sample's images are not in order.
    """
    yield resolved(recipe)
    check_model_folder(recipe.model.path)
    open_source(recipe.weights.url, recipe.run.dir / "weights")
    check_trackers(recipe.track.trackers)
    yield f"boxes are written in the frame {resolved_box_frame(recipe.model).value!r}"
    data = open_data(recipe.data)
    sample = first_sample(recipe, data)
    yield estimate(recipe, model_shape(recipe.model.path), sources=len(sample.images))
    held_out = ", ".join(f"{name} ({len(samples)} samples)" for name, samples in data.held_out.items())
    yield f"data: {len(data.train)} samples to train on; held out: {held_out}"
    yield first_prompt(recipe, sample, PromptRuler(recipe.model.path))


def resolved(recipe: Recipe) -> str:
    """Every setting with its value, defaults and the environment's overrides included, as TOML."""
    values = recipe.model_dump(mode="json")
    sections = [f"[{name}]\n" + "\n".join(_setting(key, value) for key, value in keys.items()) for name, keys in values.items()]
    return "\n\n".join(sections)


def _setting(key: str, value: object) -> str:
    return f"# {key} is unset" if value is None else f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inside} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def estimate(recipe: Recipe, shape: ModelShape, *, sources: int) -> str:
    """The memory estimate as lines, with a total for each place."""
    lines = [f"memory estimate, {shape.parameters:,} parameters:"]
    for place, parts in groupby(needs(recipe, shape, sources=sources), key=lambda need: need.place):
        found = list(parts)
        lines.append(f"  {place + ':':<14} {_size(sum(need.size_bytes for need in found)):>10}")
        lines += [f"    {_size(need.size_bytes):>10}  {need.part}" for need in found]
    return "\n".join(lines)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def first_sample(recipe: Recipe, data: RunData) -> Sample:
    """The sample of dispatch index 0: the run's first prompt."""
    return data.train[place_of(0, rows=len(data.train), seed=recipe.run.seed).row]


def first_prompt(recipe: Recipe, sample: Sample, ruler: PromptRuler) -> str:
    """The first prompt as the model sees it with all sources, its images and its truth."""
    lines = [f"first prompt: {sample.prompt_id}"]
    total = 0
    for name, data in sample.images.items():
        what = f"{sample.prompt_id}, source {name!r}"
        image = open_image(data, what=what, max_pixels=recipe.data.max_image_pixels)
        tokens = ruler.image_tokens(image.size, what=what)
        total += tokens
        lines.append(f"  image {name}: {image.width} x {image.height} pixels, {len(data)} bytes, {tokens} tokens")
    text = ruler.text(sample.question, list(sample.images))
    lines.append(f"  tokens of all images: {total}; model.max_model_len is {recipe.model.max_model_len}")
    lines.append(f"  truth: {sample.truth.model_dump_json()}")
    return "\n".join([*lines, *(f"  | {line}" for line in text.splitlines())])


if __name__ == "__main__":
    sys.exit(main())
