# SPDX-License-Identifier: Apache-2.0
"""Tests the generator of scenes: equal seeds give equal scenes; files agree."""

import json
import pathlib
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the examples' requirements")
pytest.importorskip("sklearn", reason="the examples' requirements")

import PIL.Image
import skimage

from tf_deform.demo import _digit_scenes as digit_scenes

_COUNTS = {"train": 5, "val": 3, "test": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return digit_scenes.write(
        tmp_path_factory.mktemp("scenes") / "set", seed=3, **_COUNTS
    )


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _read(path: pathlib.Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def _decode(code: dict) -> np.ndarray:
    """Decodes COCO's uncompressed run lengths: by columns, zeros first."""
    values = np.arange(len(code["counts"])) % 2
    flat = np.repeat(values, code["counts"])
    return flat.reshape(code["size"], order="F").astype(bool)


def test_same_seed_same_files(folder, tmp_path):
    again = digit_scenes.write(tmp_path / "again", seed=3, **_COUNTS)
    assert _files(again) == _files(folder)


def test_a_scene_does_not_depend_on_the_counts(folder, tmp_path):
    fewer = digit_scenes.write(
        tmp_path / "fewer", seed=3, train=2, val=0, test=3
    )
    everything = _files(folder)
    scenes = {
        name: content
        for name, content in _files(fewer).items()
        if not name.endswith(".json")
    }
    assert len(scenes) == 3 * (2 + 3)
    assert all(everything[name] == content for name, content in scenes.items())


def test_seed_part_and_index_matter():
    scenes = [
        digit_scenes.compose(part, index, seed)
        for part, index, seed in (
            ("train", 0, 0),
            ("train", 0, 1),
            ("train", 1, 0),
            ("val", 0, 0),
        )
    ]
    for i, scene in enumerate(scenes):
        for other in scenes[:i]:
            assert not np.array_equal(scene.image, other.image)


def test_parts_share_neither_digits_nor_pictures():
    digits, pictures = {}, {}
    for part in ("train", "val", "test"):
        scenes = [digit_scenes.compose(part, index) for index in range(60)]
        digits[part] = {digit for scene in scenes for digit in scene.digits}
        pictures[part] = {scene.picture for scene in scenes}
    assert max(digits["train"]) < min(digits["val"])
    assert max(digits["val"]) < min(digits["test"])
    assert pictures["train"].isdisjoint(pictures["val"] | pictures["test"])
    assert pictures["val"].isdisjoint(pictures["test"])


def test_pictures_come_in_the_wheel():
    # The wheel's record lists the files that the wheel brought, and no picture
    # that was fetched later.
    import importlib.metadata

    record = {str(path) for path in importlib.metadata.files("scikit-image")}
    data = pathlib.Path(skimage.__file__).parent / "data"
    for names in digit_scenes._PICTURES.values():
        for name in names:
            assert (data / name).exists()
            assert f"skimage/data/{name}" in record


def _read_voc(path: pathlib.Path) -> tuple[str, list[int], list[tuple]]:
    """Returns a VOC file's image, its width and height, and its boxes."""
    root = ET.parse(path).getroot()
    boxes = []
    for item in root.iter("object"):
        corners = [int(value.text) for value in item.find("bndbox")]
        assert [x.tag for x in item.find("bndbox")] == VOC_CORNERS
        boxes.append((item.findtext("name"), *corners))
    size = [int(root.findtext(f"size/{tag}")) for tag in ("width", "height")]
    return root.findtext("filename"), size, boxes


VOC_CORNERS = ["xmin", "ymin", "xmax", "ymax"]


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_annotations_agree_with_the_masks(folder, part):
    coco = json.loads((folder / part / "instances.json").read_text())
    assert len(coco["images"]) == _COUNTS[part]
    for kind, count in (
        ("categories", 10),
        ("annotations", len(coco["annotations"])),
    ):
        ids = [item["id"] for item in coco[kind]]
        assert ids == [*range(1, count + 1)]
    names = {item["id"]: item["name"] for item in coco["categories"]}
    for entry in coco["images"]:
        stem = entry["file_name"].removesuffix(".png")
        image = _read(folder / part / "images" / entry["file_name"])
        mask = _read(folder / part / "masks" / entry["file_name"])
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == mask.shape == (entry["height"], entry["width"])
        mine = [
            item
            for item in coco["annotations"]
            if item["image_id"] == entry["id"]
        ]
        assert mine
        rebuilt, expected = np.zeros_like(mask), []
        for item in mine:
            pixels = _decode(item["segmentation"])
            assert not rebuilt[pixels].any()
            rebuilt[pixels] = item["category_id"]
            assert item["area"] == pixels.sum()
            rows, columns = np.nonzero(pixels)
            x, y, width, height = item["bbox"]
            right, bottom = x + width, y + height
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (right, bottom)
            # VOC counts pixels from 1 and includes both ends.
            name = names[item["category_id"]]
            expected.append((name, x + 1, y + 1, right, bottom))
        np.testing.assert_array_equal(rebuilt, mask)
        file, size, boxes = _read_voc(folder / part / "voc" / f"{stem}.xml")
        assert file == entry["file_name"]
        assert size == [entry["width"], entry["height"]]
        assert boxes == expected


def test_labels_are_the_digits_of_the_scans():
    import sklearn.datasets

    targets = sklearn.datasets.load_digits().target
    for index in range(20):
        scene = digit_scenes.compose("train", index)
        categories = [category for category, _ in scene.instances]
        assert categories == [targets[digit] + 1 for digit in scene.digits]
        assert set(np.unique(scene.mask)) == {0, *categories}


def test_digits_are_brighter_than_what_is_around_them():
    inside, outside = [], []
    for index in range(20):
        scene = digit_scenes.compose("val", index)
        inside.append(scene.image[scene.mask > 0].mean())
        outside.append(scene.image[scene.mask == 0].mean())
    assert np.all(np.subtract(inside, outside) > 0)


def test_the_second_call_reuses(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert digit_scenes.write(folder, seed=3, **_COUNTS) == folder
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before


def test_other_arguments_are_an_error(folder):
    before = _files(folder)
    with pytest.raises(ValueError, match="Remove the folder"):
        digit_scenes.write(folder, seed=4, **_COUNTS)
    assert _files(folder) == before


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        digit_scenes.write(tmp_path, **_COUNTS)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"train": -1}, {"val": -2}, {"test": -1}]
)
def test_negative_arguments_are_an_error(tmp_path, wrong):
    with pytest.raises(ValueError, match="0 or more"):
        digit_scenes.write(tmp_path / "set", **{**_COUNTS, **wrong})
    assert not (tmp_path / "set").exists()


def test_an_interrupted_call_leaves_no_set(folder, tmp_path, monkeypatch):
    compose = digit_scenes.compose

    def interrupted(part, index, seed):
        if (part, index) == ("val", 1):
            raise KeyboardInterrupt
        return compose(part, index, seed)

    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(digit_scenes, "compose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            digit_scenes.write(out, seed=3, **_COUNTS)
    assert not out.exists()
    digit_scenes.write(out, seed=3, **_COUNTS)
    assert _files(out) == _files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
