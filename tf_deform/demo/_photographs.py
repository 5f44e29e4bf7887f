# SPDX-License-Identifier: Apache-2.0
"""Cuts the demo's four aerial photographs into sets in Pascal VOC's form."""

from __future__ import annotations

import os
import pathlib
import shutil
import xml.etree.ElementTree as ET

import numpy as np

from tf_deform import _files
from tf_deform.demo import _fetch

CLASS = "Tree"
# The sets that models are tested on, and where their photographs were taken.
TESTS = {
    "yellowstone": "Yellowstone, another place",
    "florida": "Ordway-Swisher, Florida",
    "california": "Soaproot Saddle, California",
}

# Pixels of one side of a test tile, about: a photograph is divided evenly.
_TILE = 400
# Rows of the training photograph, at its lower edge, that are for validation.
_STRIP = 416
# A tree of which a cut leaves less than this share is no longer counted.
_LEAST_SHARE = 0.5

_TRAINING = "2019_YELL_2_528000_4978000_image_crop2.png"
_TESTED = {
    "yellowstone": "2019_YELL_2_541000_4977000_image_crop.png",
    "florida": "OSBS_029.tif",
    "california": "SOAP_061.png",
}

_ABOUT = """\
Aerial photographs of the National Ecological Observatory Network (NEON), with
trees annotated by the authors of DeepForest, cut from the files of the wheel
{file} (package index: {name} {version}), whose licence is in LICENSE.

train        the photograph {training} without its lowest
             {strip} rows
val          these rows, in tiles
yellowstone  another photograph of the same park, in tiles
florida      one photograph
california   one photograph, whose dead and living trees are one class here

A tree that a cut leaves less than {share:.0%} of is "difficult": it is neither
learned nor counted. Any other tree that is cut is "truncated".
"""


def write(folder: str | os.PathLike) -> pathlib.Path:
    """Writes the sets train, val, yellowstone, florida and california.

    A set is a folder of images, each with its Pascal VOC file beside it; boxes
    count pixels from 0. `tf_deform.data.read(f"voc:{folder}/train")` reads one.
    The photographs are fetched if needed. The training photograph stays whole,
    less the strip for validation; all others are tiles of about 400 pixels,
    which do not overlap.

    Args:
        folder: Folder to write; one that was written before is left as it is.

    Returns:
        The folder.

    Raises:
        RuntimeError: The photographs could not be fetched.
        OSError: The folder cannot be written, or holds something else.
    """
    folder = _files.to_path(folder)
    if (folder / "ABOUT.txt").exists():
        return folder
    source = _fetch.fetch(_fetch.PHOTOGRAPHS)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _files.writing(folder, "ABOUT.txt") as new:
        image, boxes = _read(source / _TRAINING)
        height, width, _ = image.shape
        parts = {
            "train": [(0, 0, width, height - _STRIP)],
            "val": _tiles(0, height - _STRIP, width, height),
        }
        for name, tiles in parts.items():
            _write_set(new / name, image, boxes, tiles)
        for name, file in _TESTED.items():
            image, boxes = _read(source / file)
            height, width, _ = image.shape
            _write_set(new / name, image, boxes, _tiles(0, 0, width, height))
        shutil.copy(source / "LICENSE", new)
        (new / "ABOUT.txt").write_text(
            _ABOUT.format(
                file=_fetch.PHOTOGRAPHS.file,
                name=_fetch.PHOTOGRAPHS.name,
                version=_fetch.PHOTOGRAPHS.version,
                training=_TRAINING,
                strip=_STRIP,
                share=_LEAST_SHARE,
            )
        )
    return folder


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a photograph and, `(trees, 4)`, the boxes that lie beside it."""
    import PIL.Image

    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    objects = ET.parse(path.with_suffix(".xml")).getroot().iter("object")
    boxes = [
        [float(item.findtext(f"bndbox/{name}")) for name in _CORNERS]
        for item in objects
    ]
    return pixels, np.reshape(boxes, (-1, 4))


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _tiles(x1: int, y1: int, x2: int, y2: int) -> list[tuple[int, ...]]:
    """Divides a rectangle evenly into tiles, row by row."""
    columns, rows = (
        np.linspace(low, high, max(1, round((high - low) / _TILE)) + 1)
        .round()
        .astype(int)
        .tolist()
        for low, high in ((x1, x2), (y1, y2))
    )
    return [
        (left, top, right, bottom)
        for top, bottom in zip(rows, rows[1:])
        for left, right in zip(columns, columns[1:])
    ]


def _write_set(
    folder: pathlib.Path,
    image: np.ndarray,
    boxes: np.ndarray,
    tiles: list[tuple[int, ...]],
) -> None:
    import PIL.Image

    folder.mkdir(parents=True)
    for number, (left, top, right, bottom) in enumerate(tiles):
        path = folder / f"{number:02d}.png"
        pixels = PIL.Image.fromarray(image[top:bottom, left:right])
        pixels.save(path)
        corner = np.array((left, top, left, top))
        size = np.array((right, bottom, right, bottom)) - corner
        cut = np.clip(boxes - corner, 0, size)
        share = _areas(cut) / _areas(boxes)
        seen = share > 0
        root = _voc(path.name, pixels.size, cut[seen], share[seen])
        root.write(path.with_suffix(".xml"))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _voc(
    name: str, size: tuple[int, int], boxes: np.ndarray, shares: np.ndarray
) -> ET.ElementTree:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = name
    element = ET.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*size, 3)):
        ET.SubElement(element, tag).text = str(value)
    for box, share in zip(boxes, shares):
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = CLASS
        ET.SubElement(item, "truncated").text = str(int(share < 1))
        ET.SubElement(item, "difficult").text = str(int(share < _LEAST_SHARE))
        element = ET.SubElement(item, "bndbox")
        for tag, value in zip(_CORNERS, box):
            ET.SubElement(element, tag).text = f"{value:g}"
    ET.indent(root)
    return ET.ElementTree(root)
