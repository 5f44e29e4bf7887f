# SPDX-License-Identifier: Apache-2.0
"""Makes small photographs of rectangles, and a small backbone."""

import json
import pathlib

import keras
import numpy as np
import pytest
from PIL import Image
from small_runs import SETTINGS, SMALL

CLASSES = ("blue", "red")
COLORS = ((40, 60, 220), (220, 50, 40))
# Width and height of each photograph, and its rectangles: class, edges.
PHOTOGRAPHS = (
    (96, 64, [(0, 10, 12, 40, 44), (1, 50, 8, 90, 40)]),
    (64, 80, [(1, 5, 30, 45, 70)]),
    (72, 72, [(0, 20, 20, 60, 64)]),
    (90, 66, []),
    (80, 96, [(1, 8, 10, 40, 50), (0, 36, 52, 76, 90)]),
    (66, 64, [(0, 4, 6, 34, 36)]),
    (88, 70, [(1, 30, 16, 70, 60)]),
)


def _pixels(number: int) -> np.ndarray:
    width, height, objects = PHOTOGRAPHS[number]
    noise = np.random.default_rng(number).integers(90, 150, (height, width, 3))
    pixels = noise.astype("uint8")
    for label, x1, y1, x2, y2 in objects:
        pixels[y1:y2, x1:x2] = COLORS[label]
    return pixels


def _xml(number: int) -> str:
    width, height, objects = PHOTOGRAPHS[number]
    items = "".join(
        f"<object><name>{CLASSES[label]}</name><difficult>0</difficult>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in objects
    )
    return (
        f"<annotation><filename>{number}.png</filename><size>"
        f"<width>{width}</width><height>{height}</height><depth>3</depth>"
        f"</size>{items}</annotation>"
    )


def _coco() -> dict:
    """Returns the same with the classes in another order, ids from 0."""
    images, annotations = [], []
    for number, (width, height, objects) in enumerate(PHOTOGRAPHS):
        images.append(
            {
                "id": number,
                "file_name": f"{number}.png",
                "width": width,
                "height": height,
            }
        )
        for label, x1, y1, x2, y2 in objects:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 7 - label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    categories = [{"id": 6, "name": "red"}, {"id": 7, "name": "blue"}]
    return {
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> pathlib.Path:
    """Makes voc/, coco.json, images/ and masks/ of the same photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("voc", "images", "masks"):
        (folder / name).mkdir()
    for number, (_, _, objects) in enumerate(PHOTOGRAPHS):
        pixels = _pixels(number)
        for name in ("voc", "images"):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
        (folder / f"voc/{number}.xml").write_text(_xml(number))
        ids = np.zeros(pixels.shape[:2], "uint8")
        ids[:2] = 255
        for label, x1, y1, x2, y2 in objects:
            ids[y1:y2, x1:x2] = 1 + label
        Image.fromarray(ids).save(folder / f"masks/{number}.png")
    (folder / "coco.json").write_text(json.dumps(_coco()))
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> pathlib.Path:
    """Makes a file of a small backbone with maps of strides 4 to 32."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(x)
    for channels in (6, 8, 10, 12, 14):
        x = keras.layers.Conv2D(channels, 3, 2, "same", use_bias=False)(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.ReLU()(x)
    path = tmp_path_factory.mktemp("backbone") / "tiny.keras"
    keras.Model(image, x).save(path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes the heads of detectors small."""
    from tf_deform.models import FasterRCNN

    for name, value in SMALL.items():
        monkeypatch.setitem(FasterRCNN.__init__.__kwdefaults__, name, value)


@pytest.fixture
def sources(photographs) -> dict[str, str]:
    """Returns the photographs in each form, as the command takes them."""
    return {
        "voc": f"voc:{photographs}/voc",
        "coco": f"coco:{photographs}/coco.json,{photographs}/images",
        "masks": f"masks:{photographs}/images,{photographs}/masks",
    }


@pytest.fixture(scope="session")
def detector(photographs, backbone, tmp_path_factory):
    """Trains a detector, and returns its folder and what was returned."""
    from tf_deform import tasks

    out = tmp_path_factory.mktemp("detector") / "run"
    keras.utils.clear_session(free_memory=False)
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        found = tasks.train_detector(
            f"voc:{photographs}/voc",
            out,
            val=f"coco:{photographs}/coco.json,{photographs}/images",
            backbone=backbone,
            **SETTINGS,
        )
    return out, found


@pytest.fixture(scope="session")
def segmenter(photographs, backbone, tmp_path_factory):
    """Trains a segmenter, and returns its folder and what was returned."""
    from tf_deform import tasks

    out = tmp_path_factory.mktemp("segmenter") / "run"
    keras.utils.clear_session(free_memory=False)
    found = tasks.train_segmenter(
        f"masks:{photographs}/images,{photographs}/masks",
        out,
        val=0.3,
        classes=["none", "blue", "red"],
        backbone=backbone,
        **SETTINGS,
    )
    return out, found
