"""Encoded images from files and messages: PNG and JPEG alone, and none that is larger than stated once it is decoded."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from spvla.errors import InputError

FORMATS = ("PNG", "JPEG")  # Pillow reads more, some with other programs: EPS starts Ghostscript
MAX_PIXELS = 2**25  # of one image, decoded: 100 MB


@contextlib.contextmanager
def open_image(encoded: object, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An encoded image, its header read and its pixels not yet.

    Args:
        encoded: a PNG or JPEG file's bytes.
        max_pixels: height times width may be no more; known before anything is decompressed.

    Raises:
        InputError: no such image, damaged (in the block too), or too large; the message completes "the image of step 3 ...".
    """
    if not isinstance(encoded, bytes):
        raise InputError(f"cannot be read (expected PNG or JPEG bytes, got {type(encoded).__name__})", code="damaged-image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with opened:
            if opened.width * opened.height > max_pixels:
                raise InputError(f"has {opened.height} x {opened.width} pixels, more than {max_pixels}", code="image-size")
            yield opened
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"cannot be read (neither {' nor '.join(FORMATS)})", code="damaged-image") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"has too many pixels ({error})", code="image-size") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        raise InputError(f"cannot be read ({error})", code="damaged-image") from None
