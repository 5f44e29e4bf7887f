# SPDX-License-Identifier: Apache-2.0
"""Reads photographs and masks with Pillow, and their sizes from headers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from tf_deform._squares import VOID
from tf_deform.data._folders import check_file, shown
from tf_deform.data._records import Mask

# Other formats are not tried: some run other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Modes of 8 bits that Pillow turns into RGB.
_MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr".split()
# How a whole file ends. Pillow calls a JPEG with previews behind it, as some
# telephones write it, MPO.
_ENDS = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b";",
}
_ORIENTATION = 0x0112  # EXIF's tag
# Names of Pillow's operations that set an image of each orientation upright.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class _ImageError(ValueError):
    """Says in words, with the file's name, what is wrong with an image."""


def pillow() -> ModuleType:
    """Imports Pillow with all formats.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected Pillow to be installed, for photographs. Received: "
            f"{error}. Run `pip install 'tf-deform[train]'`"
        ) from error
    Image.init()
    return Image


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says before its pixels.

    Attributes:
        size: Width and height of the upright image.
        stored: Width and height of the image as it is stored.
        orientation: EXIF's number, 1 to 8; 1 is upright.
        animated: Whether other pictures follow the first.
        grey: Whether it is gray or has a palette, as masks do, and is no JPEG.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int
    animated: bool
    grey: bool = False


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens an image; whatever goes wrong becomes an error in words."""
    module = pillow()
    bombs = (module.DecompressionBombError, module.DecompressionBombWarning)
    check_file(path)
    try:
        with module.open(path, formats=_FORMATS) as image:
            yield image
    except _ImageError:
        raise
    except bombs as error:
        raise _ImageError(
            f"Expected {shown(path)} to have at most "
            f"{2 * (module.MAX_IMAGE_PIXELS or 0)} pixels. Received: {error} "
            "Cut it into pieces, or raise PIL.Image.MAX_IMAGE_PIXELS if you "
            "trust the file"
        ) from error
    # Pillow's readers raise errors of all kinds for broken files.
    except Exception as error:
        received = f"{type(error).__name__}: {error}"
        if os.path.getsize(path) == 0:
            received = "an empty file"
        elif isinstance(error, module.UnidentifiedImageError):
            received = "none of " + ", ".join(_FORMATS)
        raise _ImageError(
            f"Expected {shown(path)} to be a sound image. Received: {received}"
        ) from error


def _orientation(image: Any) -> int:
    """Returns EXIF's orientation, which stands before the pixels."""
    try:
        # A PNG's own method decodes the pixels to look for EXIF behind them.
        exif = pillow().Image.getexif(image)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # Broken EXIF, of which Pillow raises all kinds.
        return 1
    return value if value in _UPRIGHT else 1


def _check_mode(path: str, image: Any) -> None:
    if image.mode not in _MODES:
        raise _ImageError(
            f"Expected {shown(path)} to have 8 bits for each colour. Received: "
            f"Pillow's mode {image.mode!r}. Scale it to 8 bits first, as only "
            "you know which values are black and white"
        )


def _check_end(path: str, image: Any) -> None:
    """Decodes an image whose file does not end as a whole file does.

    Something may follow the image, so only the pixels tell.
    """
    end = _ENDS.get(image.format)
    if end is not None:
        with open(path, "rb") as file:
            file.seek(-min(len(end), os.path.getsize(path)), os.SEEK_END)
            if file.read() != end:
                image.load()


def header(path: str, *, decode: bool = False) -> Header:
    """Reads the header of a photograph, and checks that the file has its end.

    Args:
        path: The image.
        decode: Whether to decode all pixels, too.

    Raises:
        OSError: There is no such file.
        ValueError: It is broken or no photograph, in words.
    """
    with _opened(path) as image:
        _check_mode(path, image)
        orientation = _orientation(image)
        animated = image.format != "MPO" and bool(
            getattr(image, "is_animated", False)
        )
        tiff = image.format == "TIFF"
        if decode or (tiff and orientation > 1):
            image.load()
        else:
            _check_end(path, image)
        other = image.size[::-1] if orientation > 4 else image.size
        # Pillow turns a TIFF itself.
        size, stored = (image.size, other) if tiff else (other, image.size)
        jpeg = image.format in ("JPEG", "MPO")
        grey = image.mode in ("1", "L", "P") and not jpeg
        return Header(size, stored, orientation, animated, grey)


def _turned(image: Any, orientation: int) -> Any:
    """Sets an image upright that has an orientation."""
    if orientation in _UPRIGHT:
        operation = getattr(pillow().Transpose, _UPRIGHT[orientation])
        image = image.transpose(operation)
    return image


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a photograph: `(height, width, 3)`, uint8, RGB, upright.

    The orientation in EXIF is applied. Grey, palette and CMYK images become
    RGB, transparency is dropped, and of an animation the first picture is read.
    Colour profiles are not applied.

    Args:
        path: A JPEG, PNG, WebP, BMP, GIF, TIFF, MPO or PPM file.

    Raises:
        OSError: There is no such file.
        ValueError: The file is broken, has 16 bits of grey or more pixels than
            Pillow allows; the message names it.
    """
    path = os.fspath(path)
    with _opened(path) as image:
        _check_mode(path, image)
        orientation = _orientation(image)
        image.load()
        if image.format == "TIFF":  # Pillow may have turned it.
            orientation = _orientation(image)
        return np.array(_turned(_rgb(image), orientation))


def _rgb(image: Any) -> Any:
    if "transparency" in image.info:
        # Pillow warns where a palette loses its transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def mask_header(path: str) -> tuple[tuple[int, int], str]:
    """Returns width and height of a mask as it is stored, and Pillow's mode.

    Raises:
        OSError: There is no such file.
        ValueError: It is no image, in words.
    """
    with _opened(path) as image:
        return image.size, image.mode


def palette(path: str) -> np.ndarray:
    """Returns the colours `(n, 3)` of a mask with a palette.

    Raises:
        OSError: There is no such file.
        ValueError: It is no image, in words.
    """
    with _opened(path) as image:
        return np.reshape(image.getpalette(), (-1, 3))


def _check_mask(path: str, image: Any, colours: bool) -> None:
    # Pillow spreads grey of 2 and 4 bits to 0..255; the raw mode tells.
    raw = image.tile[0][3] if image.tile else image.mode
    raw = raw[0] if isinstance(raw, tuple) else raw
    received = f"Pillow's mode {raw!r}"
    if image.format in ("JPEG", "MPO") or "jpeg" in str(
        image.info.get("compression")
    ):
        received = "a JPEG, which changes ids"
        expected = "without loss, for example a PNG"
    elif colours:
        if image.mode in ("1", "L", "P", "RGB", "RGBA"):
            return
        expected = "a mask of colours"
    else:
        if image.mode in ("1", "P") or (image.mode == "L" and raw == "L"):
            return
        if image.format not in ("PNG", "BMP") and image.mode == "L":
            return
        expected = "a mask of ids, with a palette or 8 bits of grey"
        if image.mode.startswith("RGB"):
            expected += ", as no table of `colours` is given"
    raise _ImageError(
        f"Expected {shown(path)} to be {expected}. Received: {received}"
    )


def packed(colour: np.ndarray) -> np.ndarray:
    """Returns colours `(..., 3)` as one integer each."""
    red, green, blue = np.moveaxis(np.asarray(colour, np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def read_mask(mask: str | os.PathLike | Mask) -> np.ndarray:
    """Reads a mask: `(height, width, 1)`, int32, class ids; 255 is void.

    A palette is ignored, its indices are the ids. A `Mask` of a `Photograph`
    says besides which labels the ids or colours of its file are.

    Args:
        mask: A file, or `Photograph.mask`.

    Raises:
        OSError: There is no such file.
        ValueError: The file is broken or no mask, or holds a value that no
            label belongs to; the message names it.
    """
    if not isinstance(mask, Mask):
        mask = Mask(os.fspath(mask))
    with _opened(mask.path) as image:
        _check_mask(mask.path, image, mask.colours)
        image = _rgb(image) if mask.colours else image
        pixels = np.array(_turned(image, mask.orientation))
    found = packed(pixels) if mask.colours else pixels.astype(np.int32)
    if mask.labels is not None:
        found = _look_up(mask, found)
    return found[..., np.newaxis]


def _look_up(mask: Mask, found: np.ndarray) -> np.ndarray:
    labels = mask.labels if mask.colours else {VOID: VOID, **mask.labels}
    keys = np.array(sorted(labels), np.int32)
    values = np.array([labels[key] for key in keys.tolist()], np.int32)
    places = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
    wrong = keys[places] != found
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        value = found[y, x]
        if mask.colours:
            value = tuple(int(value) >> shift & 255 for shift in (16, 8, 0))
        what = "colours of the table" if mask.colours else "ids with a name"
        raise _ImageError(
            f"Expected {shown(mask.path)} to hold {what}. Received: {value} at "
            f"row {y}, column {x}"
        )
    return values[places]
