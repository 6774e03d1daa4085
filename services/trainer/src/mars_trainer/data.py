"""`mars data check PATH` and `mars data convert PATH OUT.jsonl`: datasets before they are trained on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mars_shared.bars import tracked
from mars_shared.errors import ConfigError, InputError, MarsError
from mars_shared.terminal import printable
from mars_trainer.datasets.check import Findings, PromptLength, check
from mars_trainer.datasets.convert import convert
from mars_trainer.datasets.formats import FORMATS, count_rows, data_path, format_of, read_records
from mars_trainer.datasets.images import image_bytes

SHOWN = 8
"""Questions on a contact sheet."""
MAX_PIXELS = 4096 * 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or convert; returns the exit code, which is 3 if a row has a fault."""
    options = _parser().parse_args(arguments)
    names = options.sources.split(",") if options.sources else None
    try:
        options.path = data_path(options.path)
        format = options.format or format_of(options.path)
        images = options.images or (options.path if options.path.is_dir() else options.path.parent)
        if options.command == "convert":
            return _convert(options, format, names, images)
        findings = check(
            options.path,
            format,
            images=images,
            names=names,
            known_sources=options.known_sources.split(",") if options.known_sources else None,
            split=options.split,
            max_pixels=options.max_pixels,
            prompt_length=_prompt_length(options.model, options.max_prompt_length),
            max_prompt_length=options.max_prompt_length or 0,
        )
        if options.json:
            sys.stdout.write(json.dumps(_as_json(findings, options.path, format)) + "\n")
        else:
            _report(findings, options.path, format)
        if options.sheet and findings.good:
            _draw(findings, images, options.sheet, title=f"{options.path.name}, {format}", told=not options.json)
    except MarsError as error:
        sys.stderr.write(f"mars: {error}\n")
        return error.exit_code
    return InputError.exit_code if findings.faults else 0


def _prompt_length(model: Path | None, most: int | None) -> PromptLength | None:
    """What measures prompts; None if their length isn't asked about.

    Raises:
        ConfigError: a model without a length, or a length without a model.
    """
    if model is None and most is None:
        return None
    if model is None or most is None:
        given, missing = ("--max-prompt-length", "--model") if model is None else ("--model", "--max-prompt-length")
        raise ConfigError(f"{given} was given without {missing}; give both, since a prompt's length depends on the model")
    from mars_trainer.datasets.prompt_length import PromptRuler

    return PromptRuler(model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mars data", description="Check datasets, and convert them to our own JSON lines.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "find every fault of every row"), ("convert", "write our own JSON lines")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, metavar="PATH", help="a file, or a folder (LLVIP, save_to_disk)")
        command.add_argument("--format", choices=sorted(FORMATS), help="default: what the file looks like")
        command.add_argument("--sources", metavar="A,B", help="source names in image order, e.g. visible,infrared")
        command.add_argument("--images", type=Path, help="folder that image paths are below; default: the dataset's own")
        command.add_argument("--split", metavar="NAME", help="the part to read, e.g. train; default: everything")
        if name == "convert":
            command.add_argument("out", type=Path, metavar="OUT.jsonl")
        else:
            command.add_argument(
                "--known-sources", metavar="A,B", help="as data.source_names of a recipe: another source name is a fault"
            )
            command.add_argument(
                "--model", type=Path, metavar="FOLDER", help="model that prompts must fit; needs --max-prompt-length"
            )
            command.add_argument("--max-prompt-length", type=int, metavar="N", help="a prompt of more tokens is a fault")
            command.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="an image with more is a fault")
            command.add_argument("--json", action="store_true", help="print what was found as one JSON object")
            command.add_argument("--sheet", type=Path, metavar="SHEET.png", help="write a contact sheet of the first good rows")
    return parser


def _report(findings: Findings, path: Path, format: str) -> None:
    lines = [*findings.faults, f"{path}: {findings.rows} rows of format {format}, {len(findings.good)} without a fault"]
    lines += [f"  {name}: {value}" for name, value in findings.statistics().items()]
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def _as_json(findings: Findings, path: Path, format: str) -> dict[str, Any]:
    found = {"rows": findings.rows, "good": len(findings.good), "faults": findings.faults}
    return {"path": str(path), "format": format, **found, "statistics": findings.statistics()}


def _draw(findings: Findings, images: Path, sheet: Path, *, title: str, told: bool) -> None:
    from mars_trainer.pictures import draw_records

    shown = [record for record, _ in findings.good[:SHOWN]]
    draw_records(
        [(record, [image_bytes(record, image, images) for image in record.images]) for record in shown], sheet, title=title
    )
    if told:
        sys.stdout.write(f"contact sheet: {sheet}\n")


def _convert(options: argparse.Namespace, format: str, names: Sequence[str] | None, images: Path) -> int:
    out: Path = options.out
    if out.resolve() == options.path.resolve():
        raise ConfigError(f"{out} is the file that is read; name another one to write, so that what you have stays as it is")
    records = read_records(options.path, format, names, options.split)
    with tracked(records, "converting", "question", count_rows(options.path, format, options.split)) as tracked_records:
        done = convert(tracked_records, out, images=images)
    own = done.image_root == out.parent.resolve()
    told = "below its own folder" if own else f"below {done.image_root}: name that as --images to check it"
    sys.stdout.write(f"{out}: {done.questions} questions; image paths are {told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
