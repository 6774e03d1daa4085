"""Encoded bytes to pixels, with every way an image can be wrong named.

The one place where images are decoded: replicas and trainer get the same pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

from blake3 import blake3
from PIL import Image, ImageOps

from mars_shared.errors import ImageError, MediaTypeError, TooLargeError

MIN_SIDE_PX = 2
MAX_ASPECT_RATIO = 200
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)
"""What Pillow raises on corrupt files, their metadata included."""
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def media_type_of(data: bytes, *, what: str) -> str:
    """Media type by the bytes' own signature.

    Raises:
        MediaTypeError: neither PNG, JPEG nor WebP.
    """
    for signature, media_type in _SIGNATURES.items():
        if data.startswith(signature):
            return media_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise MediaTypeError(f"{what}: not an image we read; expected PNG, JPEG or WebP, got bytes that begin with {data[:8]!r}")


def open_image(data: bytes, *, what: str, max_pixels: int) -> Image.Image:
    """Decode to RGB, upright.

    Args:
        data: the encoded bytes.
        what: how errors name the item, e.g. "prompt 17, source 'visible'".
        max_pixels: width * height above which the image is refused before it is decoded.

    Raises:
        MediaTypeError: not PNG, JPEG or WebP.
        TooLargeError: more than `max_pixels`.
        ImageError: truncated or corrupt, a side below MIN_SIDE_PX, or longer than MAX_ASPECT_RATIO.
    """
    media_type_of(data, what=what)
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(_MEDIA_TYPES))
        _check_size(image.size, what, max_pixels)
        upright = ImageOps.exif_transpose(image)
        return _eight_bits(upright).convert("RGB")
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{what}: {error}; expected at most {max_pixels} pixels") from error
    except _DECODING_ERRORS as error:
        raise ImageError(f"{what}: cannot be decoded ({error}); expected a whole PNG, JPEG or WebP file") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image, as depth and infrared cameras write, scaled to 8 bits; others as they are.

    Pillow's own conversion would clip everything above 255.
    """
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")


def _check_size(size: tuple[int, int], what: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TooLargeError(f"{what}: {width} x {height} pixels; expected at most {max_pixels} pixels in all")
    if min(size) < MIN_SIDE_PX:
        raise ImageError(f"{what}: {width} x {height} pixels; expected at least {MIN_SIDE_PX} on each side")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ImageError(f"{what}: {width} x {height} pixels; expected an aspect ratio of at most {MAX_ASPECT_RATIO}")


def pixel_hash(values: bytes, grid_thw: Sequence[int]) -> str:
    """Names what a vision tower gets of one image, equally in sampler and trainer.

    Args:
        values: float32, little-endian, [patches, patch size], rounded to the dtype in which the sampler works.
        grid_thw: patches along time, height and width.

    Returns:
        hexadecimal blake3
    """
    time, height, width = grid_thw
    return blake3(f"{time}x{height}x{width}:".encode() + values).hexdigest()
