# SPDX-License-Identifier: Apache-2.0
"""Tests what is done with annotations after reading, and names of sources."""

import contextlib
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_sets import (
    CLASSES,
    OBJECTS,
    SIZES,
    WRITERS,
    mask,
    object_xml,
    picture,
    write_coco,
    write_masks,
    write_voc,
    xml,
)

from tf_deform import data


def names_of(annotations):
    """Returns class names of all objects."""
    return [
        [annotations.classes[label] for label in photograph.labels]
        for photograph in annotations.photographs
    ]


def photograph(place, count=1):
    boxes = [(i, 0, i + 2, 3 + place) for i in range(count)]
    return data.Photograph(f"{place}.png", 50, 60, boxes, [place % 2] * count)


@pytest.mark.parametrize("form", ["voc", "coco", "yolo"])
def test_all_forms_tell_the_same(form, tmp_path):
    result = data.read(WRITERS[form](tmp_path))
    assert result.classes == CLASSES
    assert [x.path.rsplit("/", 1)[-1] for x in result.photographs] == [
        f"{name}.png" for name in SIZES
    ]
    for one, (name, objects) in zip(
        result.photographs, OBJECTS.items(), strict=True
    ):
        assert (one.width, one.height) == SIZES[name]
        np.testing.assert_allclose(
            one.boxes, np.reshape([x for _, x in objects], (-1, 4)), atol=1e-5
        )
        assert one.boxes.dtype == np.float32 and one.labels.dtype == np.int32
        assert not one.crowd.any() and not one.difficult.any()
    assert names_of(result) == [
        [label for label, _ in objects] for objects in OBJECTS.values()
    ]
    assert "objects: 3 (car 1, dog 2)" in result.notes


def test_classes_are_joined_by_name(tmp_path):
    result = data.read(write_coco(tmp_path))
    other = result.select(("cat", "dog", "bird", "car"))
    assert other.classes == ("cat", "dog", "bird", "car")
    assert names_of(other) == names_of(result)
    assert other.photographs[0].labels.tolist() == [3, 1]
    again = data.read(
        f"coco:{tmp_path}/labels.json,{tmp_path}/images",
        classes=["cat", "dog", "bird", "car"],
    )
    assert again.photographs[0].labels.tolist() == [3, 1]


def test_an_unknown_class_names_both_lists(tmp_path):
    result = data.read(write_coco(tmp_path))
    with pytest.raises(ValueError) as error:
        result.select(["dog", "bird"])
    assert str(error.value) == (
        "Expected objects of dog, bird alone. Received: objects of car; the "
        "data has the classes car, dog"
    )
    with pytest.raises(ValueError, match="Letters count: dog is not Dog$"):
        result.select(["Dog", "car"])
    with pytest.raises(ValueError, match="classes of different names"):
        result.select(["dog", "car", "dog"])


def test_a_class_without_an_object_may_be_unknown():
    one = data.Annotations(("background", "car"), (photograph(1),))
    assert one.select(["car"]).photographs[0].labels.tolist() == [0]


def test_masks_follow_the_classes(tmp_path):
    result = data.read(write_masks(tmp_path))
    other = result.select(["dog", "cat", "ground", "car"])
    table = np.full(256, 255)
    table[[0, 1, 2]] = 2, 3, 0
    for one, name in zip(other.photographs, SIZES, strict=True):
        found = data.read_mask(one.mask)[..., 0]
        np.testing.assert_array_equal(found, table[mask(name)])
    back = other.select(result.classes)
    np.testing.assert_array_equal(
        data.read_mask(back.photographs[0].mask)[..., 0], mask("a")
    )
    with pytest.raises(ValueError, match="Received: objects of car, dog; the"):
        result.select(["ground"])


@pytest.mark.parametrize(
    "share, second", [(0.2, 2), (0.001, 1), (0.999, 10), (0.5, 6)]
)
def test_the_split_is_drawn_by_the_seed(share, second):
    whole = data.Annotations(
        ("car", "dog"), tuple(photograph(i) for i in range(11)), ("odd",)
    )
    parts = [
        [
            [x.path for x in part.photographs]
            for part in whole.split(share, seed)
        ]
        for seed in (3, 3, 4)
    ]
    assert parts[0] == parts[1]
    assert [len(part) for part in parts[0]] == [11 - second, second]
    for part in parts:
        assert sorted(sum(part, [])) == sorted(f"{i}.png" for i in range(11))
        assert sum(part, []) != sum(parts[0], []) or part == parts[0]
    assert any(part != parts[0] for part in parts[2:]) or share > 0.99
    first, second = whole.split(share, 3)
    assert first.classes == second.classes == whole.classes
    assert first.notes[0] == "odd"


def test_the_split_says_which_class_it_leaves_out():
    whole = data.Annotations(
        ("car", "dog"), tuple(photograph(i) for i in (1, 2, 3))
    )
    parts = whole.split(0.3, 0)
    (lost,) = {1, 0} - set(parts[1].photographs[0].labels.tolist())
    assert parts[1].notes == (
        f"classes without an object in this part: {whole.classes[lost]}",
    )


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_a_wrong_share_is_refused(share):
    whole = data.Annotations(("car", "dog"), (photograph(1), photograph(2)))
    with pytest.raises(ValueError, match="`share` to be between 0 and 1"):
        whole.split(share)
    with pytest.raises(ValueError, match="at least two photographs"):
        data.Annotations(("car", "dog"), (photograph(1),)).split(0.5)


def index_of(content):
    """Returns pycocotools' index of COCO's json."""
    with contextlib.redirect_stdout(io.StringIO()):
        result = COCO()
        result.dataset = json.loads(json.dumps(content))
        result.createIndex()
    return result


def evaluated(truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_pycocotools_takes_the_json():
    """Tests ids from 1, areas, and crowds and difficult ones, ignored."""
    boxes = [(2, 3, 40, 50), (5.5, 6, 20, 30), (1, 1, 9, 9), (30, 30, 45, 55)]
    whole = data.Annotations(
        ("car", "dog"),
        (
            data.Photograph("x.png", 70, 60),
            data.Photograph(
                "y.png",
                50,
                60,
                boxes,
                [1, 1, 0, 1],
                [False, True, False, False],
                [False, False, False, True],
            ),
            photograph(4, 3),
        ),
    )
    content = whole.to_coco()
    truth = index_of(content)
    assert truth.getImgIds() == [1, 2, 3] and truth.getCatIds() == [1, 2]
    assert [truth.cats[i]["name"] for i in (1, 2)] == ["car", "dog"]
    assert truth.imgs[1]["file_name"] == "x.png"
    assert (truth.imgs[2]["width"], truth.imgs[2]["height"]) == (50, 60)
    assert truth.getAnnIds() == list(range(1, 8))
    assert truth.getAnnIds(imgIds=[2]) == [1, 2, 3, 4]
    assert [truth.anns[i]["iscrowd"] for i in range(1, 8)] == [
        0,
        1,
        0,
        1,
        0,
        0,
        0,
    ]
    assert truth.anns[2]["bbox"] == [5.5, 6, 14.5, 24]
    assert truth.anns[2]["area"] == 14.5 * 24
    # All but the ignored ones are found.
    found = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": one["bbox"],
            "score": 0.9 - 0.01 * one["id"],
        }
        for one in content["annotations"]
        if not one["iscrowd"]
    ]
    stats = evaluated(truth, found)
    assert stats[0] == pytest.approx(1)
    # The dog of 38x47 is of medium size, the cars are small.
    assert stats[3:6].tolist() == pytest.approx([1, 1, -1])
    worse = evaluated(truth, found[1:])
    assert worse[0] == pytest.approx(0.5)


def test_difficult_and_crowds_are_told_apart(tmp_path):
    write_voc(tmp_path)
    attribute = (
        "<attributes><attribute><name>is_crowd</name><value>True</value>"
        "</attribute></attributes>"
    )
    objects = [
        object_xml("car", (1, 1, 5, 5), "<difficult>1</difficult>"),
        object_xml("dog", (2, 2, 6, 6), attribute),
    ]
    (tmp_path / "a.xml").write_text(xml("a", [], more="".join(objects)))
    for crowds in ("ignore", "objects"):
        one = data.read(f"voc:{tmp_path}", crowds=crowds).photographs[0]
        assert one.difficult.tolist() == [True, False]
        assert one.crowd.tolist() == [False, crowds == "ignore"]


def test_a_photograph_is_not_changed_by_accident():
    boxes = np.ones((1, 4), np.float32) * [1, 1, 2, 2]
    one = data.Photograph("x.png", 5, 5, boxes, [0])
    boxes[:] = 0
    assert one.boxes.tolist() == [[1, 1, 2, 2]]
    with pytest.raises(ValueError):
        one.boxes[0] = 0
    assert data.Photograph("x.png", 5, 5).boxes.shape == (0, 4)


def test_names_with_marks_of_the_source(tmp_path):
    root = tmp_path / "2026:10, photos ü"
    assert data.read(write_voc(root / "voc")).photographs
    assert data.read(write_coco(root / "co,co")).photographs
    assert data.read(write_masks(root / "ma,sks")).photographs


def test_a_home_is_found(tmp_path, monkeypatch):
    write_voc(tmp_path / "photos")
    write_coco(tmp_path / "coco")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.read("voc:~/photos").photographs) == 3
    assert data.read("coco:~/coco/labels.json,~/coco/images").photographs


def test_names_beyond_ascii_are_found_however_they_are_written(tmp_path):
    """Tests names as macOS and other systems write the same letters."""
    source = write_coco(tmp_path)
    written, told = (
        unicodedata.normalize(form, "Straße Ü 街.png")
        for form in ("NFD", "NFC")
    )
    assert written != told
    (tmp_path / "images/a.png").rename(tmp_path / "images" / written)
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"][0]["file_name"] = told
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert len(data.read(source).photographs) == 3


def test_a_name_that_is_no_text_is_kept(tmp_path):
    source = write_voc(tmp_path)
    path = str(tmp_path).encode() + b"/\xff.png"
    with open(path, "wb") as file:
        picture("a").save(file, "PNG")
    result = data.read(source)
    assert len(result.photographs) == 4
    assert "taken as empty: 1" in "\n".join(result.notes).encode().decode()


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("photos", {}, "Expected one of voc:ROOT"),
        ("pascal:photos", {}, "Expected one of voc:ROOT"),
        ("voc:", {}, "Expected one of voc:ROOT"),
        ("masks:photos", {}, "Expected masks:IMAGES,LABELS"),
        (
            "voc:photos",
            {},
            "Expected a folder. Received: 'photos', which is no",
        ),
        ("yolo:photos", {}, "Expected a folder. Received: 'photos'"),
        ("coco:a.json,photos", {}, "Expected a file. Received: 'a.json'"),
        ("masks:a,b", {}, "Expected a folder. Received: 'a'"),
        ("coco:a,b", {"base": 1}, "Expected `base` with voc alone"),
        ("voc:a", {"first_id": 1}, "Expected `first_id` with yolo alone"),
        ("yolo:a", {"colours": "voc"}, "Expected `colours` with masks alone"),
        ("voc:a", {"base": 2}, "Expected `base` to be 0 or 1"),
        ("voc:a", {"crowds": "drop"}, "`crowds` 'ignore' or 'objects'"),
    ],
)
def test_a_wrong_source_is_refused(
    source, options, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        data.read(source, **options)


def test_many_broken_files_are_counted_and_the_first_named(tmp_path):
    source = write_voc(tmp_path)
    for number in range(14):
        (tmp_path / f"broken{number:02}.xml").write_text("<annotation>")
        Image.new("RGB", (9, 7)).save(tmp_path / f"broken{number:02}.png")
    with pytest.raises(ValueError) as error:
        data.read(source)
    message = str(error.value)
    assert "Expected 17 sound files" in message and "14 that are not" in message
    assert message.count("broken0") == 10 and "and 4 more" in message
    left = data.read(source, skip_broken=True)
    assert len(left.photographs) == 3
    assert sum("broken and left out" in note for note in left.notes) == 14


def test_no_photograph_left_is_an_error(tmp_path):
    source = write_coco(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="at least one photograph"):
        data.read(source, skip_broken=True)


def test_areas_are_those_of_outlines(tmp_path):
    """Tests that COCO's measures of small objects stay what COCO's are."""
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 50)).save(path)
    box = {"image_id": 3, "category_id": 5, "bbox": [10, 5, 40, 20]}
    outline = [[10, 5, 50, 5, 10, 25]]
    others = [
        {"area": 400, "segmentation": outline},
        {"area": 400, "segmentation": []},  # counted by nobody knows whom
        {"segmentation": outline, "bbox": [0, 0, 30, 20]},
        {"area": 9e9, "segmentation": outline, "bbox": [30, 40, 40, 20]},
    ]
    file = tmp_path / "a.json"
    content = {
        "images": [{"id": 3, "file_name": "a.png", "width": 60, "height": 50}],
        "categories": [{"id": 5, "name": "kite"}],
        "annotations": [{"id": i, **box, **x} for i, x in enumerate(others)],
    }
    file.write_text(json.dumps(content))
    (photo,) = data.read(f"coco:{file},{tmp_path}").photographs
    expected = [400, 800, 600, 300]
    assert photo.areas.tolist() == expected
    found = data.read(f"coco:{file}").select(["other", "kite"]).to_coco()
    assert [x["area"] for x in found["annotations"]] == expected
