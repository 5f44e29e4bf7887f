# SPDX-License-Identifier: Apache-2.0
"""Writes the same three photographs with objects in each of the four forms."""

import json
import pathlib

import numpy as np
from PIL import Image

# Width and height of each.
SIZES = {"a": (24, 16), "b": (20, 30), "c": (18, 14)}
CLASSES = ("car", "dog")
# Class and edges of the objects; `c` has none.
OBJECTS = {
    "a": [("car", (2, 3, 10, 12)), ("dog", (11, 1, 23, 15))],
    "b": [("dog", (4, 5, 19, 28))],
    "c": [],
}


def picture(name, mode="RGB"):
    width, height = SIZES[name]
    rng = np.random.default_rng(ord(name))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        picture(name).save(folder / f"{name}.png")


def box_xml(edges):
    return "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), edges, strict=True
        )
    )


def object_xml(name, edges, more=""):
    return (
        f"<object><name>{name}</name>{more}<bndbox>{box_xml(edges)}</bndbox>"
        "</object>"
    )


def xml(name, objects=None, size=None, more=""):
    width, height = size or SIZES[name]
    objects = OBJECTS[name] if objects is None else objects
    return (
        f"<annotation><filename>{name}.png</filename><size><width>{width}"
        f"</width><height>{height}</height></size>{more}"
        + "".join(object_xml(*x) for x in objects)
        + "</annotation>"
    )


def write_voc(root):
    write_images(root)
    for name in SIZES:
        (root / f"{name}.xml").write_text(xml(name))
    return f"voc:{root}"


def coco():
    """Returns COCO's json; ids of images, categories and objects differ."""
    images, annotations = [], []
    for name, (width, height) in SIZES.items():
        key = 7 + len(images)
        images.append(
            {
                "id": key,
                "file_name": f"{name}.png",
                "width": width,
                "height": height,
            }
        )
        for label, (x1, y1, x2, y2) in OBJECTS[name]:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": key,
                    "category_id": 3 + CLASSES.index(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 3 + i, "name": name} for i, name in enumerate(CLASSES)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def write_json(root, value):
    (root / "labels.json").write_text(json.dumps(value))


def write_coco(root):
    write_images(root / "images")
    write_json(root, coco())
    return f"coco:{root}/labels.json,{root}/images"


def yolo(name):
    width, height = SIZES[name]
    lines = []
    for label, (x1, y1, x2, y2) in OBJECTS[name]:
        numbers = (
            (x1 + x2) / 2 / width,
            (y1 + y2) / 2 / height,
            (x2 - x1) / width,
            (y2 - y1) / height,
        )
        lines.append(" ".join(map(str, (CLASSES.index(label), *numbers))))
    return "\n".join(lines) + "\n"


def write_yolo(root):
    write_images(root / "images")
    (root / "labels").mkdir()
    for name in SIZES:
        (root / f"labels/{name}.txt").write_text(yolo(name))
    (root / "data.yaml").write_text(f"names: [{', '.join(CLASSES)}]\n")
    return f"yolo:{root}"


def mask(name):
    """Returns ids: 0 where there is no object, 255 in the last row."""
    width, height = SIZES[name]
    pixels = np.zeros((height, width), np.uint8)
    for label, (x1, y1, x2, y2) in OBJECTS[name]:
        pixels[y1:y2, x1:x2] = 1 + CLASSES.index(label)
    pixels[-1] = 255
    return pixels


def write_mask(root, name, pixels=None, palette=True):
    image = Image.fromarray(mask(name) if pixels is None else pixels)
    if palette:
        colours = np.random.default_rng(5).integers(0, 256, 768, np.uint8)
        image.putpalette(colours.tobytes())
    image.save(root / f"masks/{name}.png")


def write_masks(root):
    write_images(root / "images")
    (root / "masks").mkdir()
    for name in SIZES:
        write_mask(root, name)
    names = {0: "ground", 1: "car", 2: "dog"}
    (root / "masks/names.json").write_text(json.dumps(names))
    return f"masks:{root}/images,{root}/masks"


WRITERS = {
    "voc": write_voc,
    "coco": write_coco,
    "yolo": write_yolo,
    "masks": write_masks,
}


def images_of(form, root):
    return root if form == "voc" else pathlib.Path(root) / "images"
