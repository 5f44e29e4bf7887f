# SPDX-License-Identifier: Apache-2.0
"""Tests how photographs are cut, on drawn ones: trees are coloured boxes."""

import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest

from tf_deform.demo import _fetch, _photographs

BACKGROUND = 7
CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Sizes as (width, height). All trees but the last of the training photograph
# lie on one side of its cut, which is at row 30, and of the others' cuts.
TRAINING = (50, 70)
TRAINING_TREES = [
    (3, 4, 9, 12),
    (20, 25, 30, 35),
    (10, 28, 20, 60),
    (1, 69, 9, 70),
]
OTHERS = {
    # It is divided at columns 20 and 39, and row 18.
    "yellowstone": ((59, 37), [(1, 1, 5, 6), (17, 3, 25, 9), (30, 15, 50, 21)]),
    "florida": ((19, 21), [(2, 3, 11, 8)]),
    "california": ((23, 17), []),
}


def draw(path, size, trees, name="Tree"):
    pixels = np.full((*size[::-1], 3), BACKGROUND, "uint8")
    root = ET.Element("annotation")
    for number, box in enumerate(trees):
        x1, y1, x2, y2 = box
        pixels[y1:y2, x1:x2] = 50 + number
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = name
        element = ET.SubElement(item, "bndbox")
        for corner, value in zip(CORNERS, box):
            ET.SubElement(element, corner).text = str(value)
    PIL.Image.fromarray(pixels).save(path)
    ET.ElementTree(root).write(path.with_suffix(".xml"))


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    draw(folder / _photographs._TRAINING, TRAINING, TRAINING_TREES)
    for name, (size, trees) in OTHERS.items():
        draw(folder / _photographs._TESTED[name], size, trees, name)
    (folder / "LICENSE").write_text("as you like")
    monkeypatch.setattr(_fetch, "fetch", lambda wheel: folder)
    monkeypatch.setattr(_photographs, "_TILE", 20)
    monkeypatch.setattr(_photographs, "_STRIP", 40)
    return folder


def read(folder):
    """Returns pixels and `(truncated, difficult, box)` of each image."""
    found = []
    for path in sorted(folder.glob("*.xml")):
        root = ET.parse(path).getroot()
        image = PIL.Image.open(path.with_name(root.findtext("filename")))
        assert root.findtext("size/width") == str(image.width)
        assert root.findtext("size/height") == str(image.height)
        objects = [
            (
                int(item.findtext("truncated")),
                int(item.findtext("difficult")),
                tuple(float(item.findtext(f"bndbox/{c}")) for c in CORNERS),
            )
            for item in root.iter("object")
        ]
        names = {item.findtext("name") for item in root.iter("object")}
        assert names <= {"Tree"}
        found.append((np.asarray(image), objects))
    return found


def test_sets_hold_the_photographs_cut(source, tmp_path):
    out = _photographs.write(tmp_path / "deeper" / "trees")
    assert sorted(path.name for path in out.iterdir()) == [
        "ABOUT.txt",
        "LICENSE",
        *sorted(["california", "florida", "train", "val", "yellowstone"]),
    ]
    assert (out / "LICENSE").read_text() == "as you like"
    ((pixels, trees),) = read(out / "train")
    assert pixels.shape == (30, 50, 3)
    assert trees == [
        (0, 0, (3, 4, 9, 12)),
        (1, 0, (20, 25, 30, 30)),  # Half of it is here, half in the strip.
        (1, 1, (10, 28, 20, 30)),
    ]
    ((pixels, trees),) = read(out / "florida")
    assert pixels.shape == (21, 19, 3)
    assert trees == [(0, 0, (2, 3, 11, 8))]
    ((_, trees),) = read(out / "california")
    assert not trees
    tiles = read(out / "yellowstone")
    assert [tile.shape[:2] for tile, _ in tiles] == [
        (18, 20),
        (18, 19),
        (18, 20),
        (19, 20),
        (19, 19),
        (19, 20),
    ]
    assert [trees for _, trees in tiles] == [
        [(0, 0, (1, 1, 5, 6)), (1, 1, (17, 3, 20, 9))],
        [(1, 0, (0, 3, 5, 9)), (1, 1, (10, 15, 19, 18))],
        [(1, 1, (0, 15, 11, 18))],
        [],
        [(1, 1, (10, 0, 19, 3))],
        [(1, 1, (0, 0, 11, 3))],
    ]


@pytest.mark.parametrize("name", ["train", "val", "yellowstone"])
def test_boxes_lie_on_their_pixels(source, tmp_path, name):
    for pixels, trees in read(_photographs.write(tmp_path / "trees") / name):
        inside = np.zeros(pixels.shape[:2], bool)
        for _, _, box in trees:
            x1, y1, x2, y2 = map(int, box)
            assert pixels[y1:y2, x1:x2].min() > BACKGROUND
            inside[y1:y2, x1:x2] = True
        np.testing.assert_array_equal(pixels[..., 0] > BACKGROUND, inside)


def test_strip_and_rest_are_the_photograph(source, tmp_path):
    out = _photographs.write(tmp_path / "trees")
    strip = [tile for tile, _ in read(out / "val")]
    rows = [np.concatenate(strip[i : i + 2], axis=1) for i in (0, 2)]
    ((rest, _),) = read(out / "train")
    whole = PIL.Image.open(source / _photographs._TRAINING)
    np.testing.assert_array_equal(np.concatenate([rest, *rows]), whole)


def test_second_call_finds_the_folder(source, tmp_path, monkeypatch):
    out = _photographs.write(tmp_path / "trees")

    def refuse(wheel):
        raise AssertionError("fetched again")

    monkeypatch.setattr(_fetch, "fetch", refuse)
    assert _photographs.write(out) == out


def test_other_folders_are_left_alone(source, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="ABOUT.txt"):
        _photographs.write(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.skipif(
    not _fetch.is_fetched(_fetch.PHOTOGRAPHS), reason="never fetched here"
)
def test_published_photographs(tmp_path):
    out = _photographs.write(tmp_path / "trees")
    counted = {}
    for name in ("train", "val", *_photographs.TESTS):
        images = read(out / name)
        counted[name] = (
            len(images),
            sum(not trees[1] for _, found in images for trees in found),
        )
    assert counted == {
        "train": (1, 473),
        "val": (6, 102),
        "yellowstone": (9, 277),
        "florida": (1, 61),
        "california": (1, 37),
    }
