# SPDX-License-Identifier: Apache-2.0
"""Writes scenes of real handwritten digits on real pictures to disk.

The digits are the 1797 scans that scikit-learn contains. The backgrounds are
photographs and textures that scikit-image contains in its wheel. Nothing is
downloaded. Every part (train, val, test) has digits and pictures of its own.

    python -m tf_deform.demo._digit_scenes --out scenes --seed 0

It writes for each part

    scenes/<part>/images/000000.png   grayscale scene, 64 x 64
    scenes/<part>/masks/000000.png    class of each pixel: 0 is background,
                                      d + 1 is the digit d
    scenes/<part>/voc/000000.xml      Pascal VOC boxes
    scenes/<part>/instances.json      COCO boxes, areas and RLE masks

and `scenes/scenes.json`, which holds the arguments of the call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import types
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np

from tf_deform import _files

IMAGE_SIZE = 64
NUM_CLASSES = 11  # The background and ten digits.
DEFAULT_COUNTS = {"train": 8000, "val": 300, "test": 1000}

# Raise the version whenever the same arguments give other files than before.
_VERSION = 1

# The scans are stored roughly by writer, so contiguous blocks keep most writers
# within one part.
_DIGITS = {
    "train": range(1300),
    "val": range(1300, 1497),
    "test": range(1497, 1797),
}

# Leaves out pictures with lettering (page, text, clock, astronaut, motorcycle):
# unlabelled glyphs would count as wrong answers.
_PICTURES = {
    "train": (
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coins.png",
        "grass.png",
        "ihc.png",
        "rocket.jpg",
    ),
    "val": ("coffee.png", "hubble_deep_field.jpg"),
    "test": ("gravel.png", "moon.png", "retina.jpg"),
}

_STROKE = 0.4  # A pixel with more ink than this belongs to the digit.


@dataclasses.dataclass
class Scene:
    """Holds one scene.

    Attributes:
        image: `(64, 64)` uint8, the gray values.
        mask: `(64, 64)` uint8, the class of each pixel, 0 is background.
        instances: list of `(category, pixels)`: the class, 1 to 10, and a
            `(64, 64)` bool array of the pixels of one digit.
        digits: for each instance the index of its scan in
            `sklearn.datasets.load_digits()`.
        picture: file name of the background.
    """

    image: np.ndarray
    mask: np.ndarray
    instances: list[tuple[int, np.ndarray]]
    digits: list[int]
    picture: str


@functools.cache
def _packages() -> tuple[types.ModuleType, ...]:
    """Imports what the extra `tf-deform[examples]` brings."""
    try:
        import PIL.Image
        import skimage.color
        import skimage.io
        import skimage.transform
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected scikit-learn, scikit-image and Pillow to be installed. "
            f"Received: {error}. Run `pip install 'tf-deform[examples]'`."
        ) from error
    return PIL, skimage, sklearn


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Returns the scans, `(1797, 12, 12)` in [0, 1], and their digits."""
    _, _, sklearn = _packages()
    data = sklearn.datasets.load_digits()
    # Two empty pixels around the scan let its ink fade out when enlarged.
    images = np.pad(data.images / 16.0, ((0, 0), (2, 2), (2, 2)))
    return images, data.target


@functools.cache
def _picture(name: str) -> np.ndarray:
    """Returns a picture of scikit-image, gray in [0, 1], at half its size."""
    _, skimage, _ = _packages()
    # Reads the file by its path: `skimage.data` would download a missing file.
    path = pathlib.Path(skimage.__file__).parent / "data" / name
    picture = skimage.io.imread(path)
    if picture.ndim == 3:
        picture = skimage.color.rgb2gray(picture)
    picture = skimage.util.img_as_float(picture)
    return skimage.transform.rescale(picture, 0.5, anti_aliasing=True)


def _background(rng: np.random.Generator, name: str) -> np.ndarray:
    """Returns a random crop of a picture, `(64, 64)` in [0, 0.3]."""
    picture = _picture(name)
    top = rng.integers(picture.shape[0] - IMAGE_SIZE + 1)
    left = rng.integers(picture.shape[1] - IMAGE_SIZE + 1)
    crop = picture[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    # The ink is added to the background, so the background leaves room for it.
    return 0.3 * np.rot90(crop, rng.integers(4))


def _deform(rng: np.random.Generator, scan: np.ndarray) -> np.ndarray | None:
    """Returns a scan deformed and placed in an empty scene.

    Args:
        rng: source of the deformation and the position.
        scan: `(12, 12)`, ink in [0, 1].

    Returns:
        `(64, 64)` ink in [0, 1], or None if the digit is too large for the
        scene.
    """
    _, skimage, _ = _packages()
    scale = np.exp(rng.uniform(np.log(1.2), np.log(5.0)))
    stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(1.6))
    linear = skimage.transform.AffineTransform(
        scale=(scale * stretch, scale / stretch),
        rotation=np.deg2rad(rng.uniform(-45, 45)),
        shear=rng.uniform(-0.4, 0.4),
    )
    middle = (np.array(scan.shape) - 1) / 2
    corners = np.array([(-4, -4), (-4, 4), (4, -4), (4, 4)])
    reach = np.abs(linear(corners)).max(axis=0)
    low, high = reach, IMAGE_SIZE - 1 - reach
    if np.any(low > high):
        return None
    translate = skimage.transform.EuclideanTransform
    placed = (
        translate(translation=-middle)
        + linear
        + translate(translation=rng.uniform(low, high))
    )
    ink = skimage.transform.warp(
        scan, placed.inverse, output_shape=(IMAGE_SIZE, IMAGE_SIZE), order=3
    )
    return np.clip(ink, 0, 1)


def compose(part: str, index: int, seed: int = 0) -> Scene:
    """Composes one scene.

    Args:
        part: "train", "val" or "test".
        index: number of the scene within its part. A scene depends on `seed`,
            `part` and `index` alone, not on the number of scenes.
        seed: seed of the whole set.

    Returns:
        A `Scene` with at least one digit; no two digits share a pixel.
    """
    rng = np.random.default_rng([seed, list(_DIGITS).index(part), index])
    scans, targets = _scans()
    picture = str(rng.choice(_PICTURES[part]))
    image = _background(rng, picture)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    taken = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    instances, digits = [], []
    wanted = rng.integers(2, 5)
    # Tries another digit, likely a smaller one, if a digit does not fit; a
    # crowded scene keeps fewer digits.
    tries = 12
    while len(instances) < wanted and (tries > 0 or not instances):
        tries -= 1
        digit = int(rng.choice(_DIGITS[part]))
        ink = _deform(rng, scans[digit])
        if ink is None:
            continue
        pixels = ink > _STROKE
        touched = ink > 0.05
        if not pixels.any() or np.any(taken & touched):
            continue
        image = image + ink * rng.uniform(0.35, 0.65)
        category = int(targets[digit]) + 1
        mask[pixels] = category
        taken |= touched
        instances.append((category, pixels))
        digits.append(digit)
    noise = rng.normal(0, rng.uniform(0, 0.05), image.shape)
    image = np.clip(np.rint((image + noise) * 255), 0, 255).astype(np.uint8)
    return Scene(image, mask, instances, digits, picture)


def _box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Returns `(x, y, width, height)` in pixels of the box around `pixels`."""
    rows = np.flatnonzero(pixels.any(axis=1))
    columns = np.flatnonzero(pixels.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _run_lengths(pixels: np.ndarray) -> dict:
    """Returns COCO's uncompressed run-length code: by columns, zeros first."""
    flat = pixels.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(pixels.shape), "counts": counts}


def _voc(scene: Scene, name: str) -> ET.ElementTree:
    """Returns the Pascal VOC annotation of a scene: 1-based, ends included."""
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = "images"
    ET.SubElement(root, "filename").text = name
    size = ET.SubElement(root, "size")
    for tag, value in zip(
        ("width", "height", "depth"),
        (*scene.mask.shape[::-1], 1),
    ):
        ET.SubElement(size, tag).text = str(value)
    ET.SubElement(root, "segmented").text = "1"
    for category, pixels in scene.instances:
        x, y, width, height = _box(pixels)
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = str(category - 1)
        ET.SubElement(item, "truncated").text = "0"
        ET.SubElement(item, "difficult").text = "0"
        box = ET.SubElement(item, "bndbox")
        for tag, value in (
            ("xmin", x + 1),
            ("ymin", y + 1),
            ("xmax", x + width),
            ("ymax", y + height),
        ):
            ET.SubElement(box, tag).text = str(value)
    ET.indent(root)
    return ET.ElementTree(root)


def _write_part(folder: pathlib.Path, part: str, count: int, seed: int) -> None:
    PIL, _, _ = _packages()
    for name in ("images", "masks", "voc"):
        (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        scene = compose(part, index, seed)
        name = f"{index:06d}.png"
        PIL.Image.fromarray(scene.image).save(folder / "images" / name)
        PIL.Image.fromarray(scene.mask).save(folder / "masks" / name)
        _voc(scene, name).write(folder / "voc" / f"{index:06d}.xml")
        images.append(
            {
                "id": index,
                "file_name": name,
                "height": IMAGE_SIZE,
                "width": IMAGE_SIZE,
            }
        )
        for category, pixels in scene.instances:
            annotations.append(
                {
                    # Ids count from 1: COCO's evaluation reads 0 as "no match".
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category,
                    "bbox": list(_box(pixels)),
                    "area": int(pixels.sum()),
                    "segmentation": _run_lengths(pixels),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": category, "name": str(category - 1), "supercategory": "digit"}
        for category in range(1, NUM_CLASSES)
    ]
    (folder / "instances.json").write_text(
        json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "categories": categories,
            }
        )
    )


def write(
    out: str | pathlib.Path,
    *,
    seed: int = 0,
    train: int = DEFAULT_COUNTS["train"],
    val: int = DEFAULT_COUNTS["val"],
    test: int = DEFAULT_COUNTS["test"],
) -> pathlib.Path:
    """Writes scenes of handwritten digits on pictures, with masks and boxes.

        part = tf_deform.demo.digit_scenes("scenes") / "train"
        tf_deform.data.read(f"coco:{part}/instances.json,{part}/images")
        tf_deform.data.read(f"masks:{part}/images,{part}/masks")

    Images are 64 x 64 pixels; class 0 of a mask is the background, d + 1 is the
    digit d. Each part has digits and pictures of its own. The same arguments
    give the same scenes; if they are in the folder already, nothing is done.

    The folder appears under its name only when it is complete, so that no call
    takes the leftovers of an interrupted call for a set of scenes.

    Args:
        out: Folder to write; its parents are made.
        seed: Seed of the whole set.
        train: Number of training scenes.
        val: Number of validation scenes.
        test: Number of test scenes.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: scikit-learn, scikit-image or Pillow is missing.
        ValueError: `out` holds something else, or a number is negative.
    """
    out = pathlib.Path(out)
    counts = {"train": train, "val": val, "test": test}
    if seed < 0 or min(counts.values()) < 0:
        raise ValueError(
            "Expected `seed` and the counts to be 0 or more. "
            f"Received: seed={seed}, {counts}"
        )
    asked = {"version": _VERSION, "seed": seed, **counts}
    record = out / "scenes.json"
    if out.exists():
        found = json.loads(record.read_text()) if record.exists() else None
        if found != asked:
            raise ValueError(
                f"Expected {out} not to exist, or to hold the scenes {asked}. "
                f"Received: {found or 'something else'}. Remove the folder or "
                "choose another one."
            )
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with _files.writing(out, record.name) as partial:
        for part, count in counts.items():
            print(f"Composing {count} {part} scenes", flush=True)
            _write_part(partial / part, part, count, seed)
        (partial / record.name).write_text(json.dumps(asked))
    return out


def read(folder: str | pathlib.Path, what: str) -> Any:
    """Reads a part of the scenes.

    Args:
        folder: The part, such as scenes/train.
        what: "segment" for masks, "detect" for boxes.

    Returns:
        The part's `tf_deform.data.Annotations`.
    """
    from tf_deform import data

    if what == "segment":
        return data.read(f"masks:{folder}/images,{folder}/masks")
    return data.read(f"coco:{folder}/instances.json,{folder}/images")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write scenes of handwritten digits on pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    for part, count in DEFAULT_COUNTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, metavar="N")
    try:
        print(write(**vars(parser.parse_args())))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
