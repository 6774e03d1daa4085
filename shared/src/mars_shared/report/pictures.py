"""Images of shown groups as data: URIs, decoded and encoded anew, so that nothing but pixels gets into a report."""

from __future__ import annotations

import base64
import io

from PIL import Image

from mars_shared.blobs import BlobStore
from mars_shared.contracts import Source
from mars_shared.errors import BlobMissingError, ImageError, IntegrityError, MediaTypeError, TooLargeError
from mars_shared.images import open_image

LARGEST_PX = 320
"""Longer side of an image in a report."""
MAX_PIXELS = 8192 * 8192
JPEG_QUALITY = 85


def data_uri(blobs: BlobStore, source: Source) -> str:
    """A source's image, scaled down to LARGEST_PX: JPEG, or PNG of one that is as small as that anyhow.

    Raises:
        BlobMissingError: the image is gone.
        IntegrityError: other bytes are in its place.
        ImageError, MediaTypeError, TooLargeError: it cannot be decoded.
    """
    image = open_image(blobs.get(source.blob), what=f"source {source.name!r}", max_pixels=MAX_PIXELS)
    small = max(image.size) <= LARGEST_PX
    if not small:
        image.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    if small:
        image.save(encoded, "PNG")
    else:
        image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(encoded.getvalue()).decode()}"


UNUSABLE = (BlobMissingError, IntegrityError, ImageError, MediaTypeError, TooLargeError)
"""Why an image may not be shown."""
