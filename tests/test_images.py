"""Every way in which an image can be wrong is named; what is right decodes to the same upright RGB pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from builders import image_bytes
from mars_shared.errors import ImageError, InputError, MediaTypeError, TooLargeError
from mars_shared.images import MAX_ASPECT_RATIO, media_type_of, open_image

WHAT = "prompt 17, source 'visible'"
LIMIT = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP")


def opened(data: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return open_image(data, what=WHAT, max_pixels=max_pixels)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", FORMATS)
def test_png_jpeg_and_webp_are_read(format: str) -> None:
    data = image_bytes((8, 6), format=format, color=(200, 10, 30))
    assert media_type_of(data, what=WHAT) == f"image/{format.lower()}"
    image = opened(data)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(image).astype(int) - (200, 10, 30)).max() < 12


def test_pixels_of_a_lossless_image_are_exact() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(encoded(Image.fromarray(pixels)))), pixels)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PN",
        b"GIF89a" + bytes(20),
        b"%PDF-1.7",
        b"<svg/>",
        b"BM" + bytes(60),
        b"RIFF\x00\x00\x00\x00WAVE",
        b"plain text",
    ],
)
def test_what_is_no_image_type_we_read_is_refused_by_its_bytes(data: bytes) -> None:
    for read in (opened, lambda data: media_type_of(data, what=WHAT)):
        with pytest.raises(MediaTypeError, match="prompt 17, source 'visible': .*expected PNG, JPEG or WebP"):
            read(data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.97])
def test_a_truncated_image_is_an_error_and_never_half_a_picture(format: str, keep: float) -> None:
    data = noise(format)
    with pytest.raises(ImageError, match="prompt 17, source 'visible': cannot be decoded"):
        opened(data[: int(len(data) * keep)])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_an_image_of_one_pixel_a_side_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{WHAT}: {size[0]} x {size[1]} pixels; expected at least 2 on each side"):
        opened(image_bytes(size))


def test_an_image_far_longer_than_wide_is_refused() -> None:
    assert opened(image_bytes((2 * MAX_ASPECT_RATIO, 2))).size == (400, 2)
    with pytest.raises(ImageError, match="401 x 2 pixels; expected an aspect ratio of at most 200"):
        opened(image_bytes((401, 2)))


def test_an_image_over_the_pixel_limit_is_refused_with_both_numbers() -> None:
    data = image_bytes((8, 6))
    assert opened(data, max_pixels=48).size == (8, 6)
    with pytest.raises(TooLargeError, match=f"{WHAT}: 8 x 6 pixels; expected at most 47 pixels"):
        opened(data, max_pixels=47)


@pytest.mark.parametrize("side", [5000, 12000, 100_000])
def test_a_size_over_the_limit_is_refused_before_anything_is_decoded(side: int) -> None:
    # Nothing but a header: decoding would fail differently.
    with pytest.raises(TooLargeError, match=f"expected at most {LIMIT} pixels"):
        opened(png_header(side, side))


def test_a_generous_limit_counts_and_not_the_decoders_own() -> None:
    # 90 million pixels: over the 89 million at which Pillow begins to warn, under the limit that was set.
    with pytest.raises(ImageError, match="cannot be decoded"):
        opened(png_header(9000, 10_000), max_pixels=100_000_000)


def test_an_image_turned_by_its_exif_tag_stands_upright() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    upright = np.asarray(opened(encoded(image, exif=exif)))
    assert upright.shape == (8, 4, 3)
    assert upright[:4].min() == 255 and upright[4:].max() == 0


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    format = "JPEG" if mode == "CMYK" else "PNG"
    image = opened(encoded(Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode), format))
    assert (image.mode, image.size) == ("RGB", (8, 6)) and np.asarray(image).min() > 250


def test_a_grey_image_of_16_bits_keeps_its_contrast() -> None:
    # Depth and infrared cameras write these; 0, a quarter, a half and all of 65535 are 0, 64, 128 and 255 of 255.
    pixels = np.array([[0, 16448], [32896, 65535]], dtype=np.uint16).repeat(4, axis=0).repeat(4, axis=1)
    image = np.asarray(opened(encoded(Image.fromarray(pixels))))
    assert [int(image[y, x, 0]) for y, x in ((0, 0), (0, 7), (7, 0), (7, 7))] == [0, 64, 128, 255]
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("after_pixels", [False, True])
def test_a_text_chunk_that_unpacks_to_megabytes_is_refused(after_pixels: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    if after_pixels:
        text.chunks = [(kind, data, True) for kind, data, *_ in text.chunks]
    with pytest.raises(ImageError, match=f"{WHAT}: cannot be decoded"):
        opened(encoded(Image.new("RGB", (8, 6)), pnginfo=text))


def exif_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = TiffImagePlugin.IFDRational(72, 1)
    return noise("JPEG", exif=exif)


ORIGINALS = [noise("PNG"), noise("JPEG"), noise("WEBP"), noise("PNG", pnginfo=None, icc_profile=b"x" * 200), exif_jpeg()]


@settings(max_examples=400, deadline=None)
@given(
    original=st.sampled_from(ORIGINALS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    head=st.booleans(),
)
def test_flipped_bytes_give_a_picture_or_an_error_that_names_the_item(original: bytes, changes: Any, head: bool) -> None:
    data = bytearray(original)
    for where, value in changes:
        data[int(where * (min(len(data), 160) if head else len(data)))] = value
    try:
        image = opened(bytes(data), max_pixels=10**6)
    except InputError as error:
        assert str(error).startswith(WHAT)
    else:
        assert image.mode == "RGB"
