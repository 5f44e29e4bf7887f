# SPDX-License-Identifier: Apache-2.0
"""Tests that files of fifteen labelling tools are read as they were drawn.

`annotations/tools.tar.xz` holds 40 data sets, each with what was drawn in
expected.json: edges of boxes with the tolerance that the tool's own rounding
leaves, and the reading that must be refused.
"""

import json
import pathlib
import re
import tarfile

import numpy as np
import pytest

from tf_deform import data

ARCHIVE = pathlib.Path(__file__).parent / "annotations/tools.tar.xz"
with tarfile.open(ARCHIVE) as archive:
    NAMES = sorted({name.split("/")[0] for name in archive.getnames()})

# What is said of a reading that must be refused.
REFUSED = {
    "coco-imantics": "category id 0 twice: car, traffic light",
    "masks-datumaro-voc": "no table of `colours`.*mode 'RGB'",
    "masks-label-studio-brush": "Received endings: none",
    "yolo-pylabel": "id 2 of 3 objects.*first_id=1",
    # It has no file of names.
    "yolo-globox": "with the names of the classes.*Received: none",
}
# What the log says of oddities.
NOTED = {
    "coco-datumaro-from-voc": "classes without an object: background",
    "coco-label-studio-two-annotators": "listed more than once.*street.png",
    "coco-labelformat-seg": r"crowds, left out .*: 1 \(car 1\)",
    "coco-pylabel": "repeat another in all fields were dropped: 1 .*street.png",
    "coco-pylabel-from-voc": "does not list were left out: 1 .*empty.png",
    "coco-supervision-masks": r"crowds, left out .*: 2 \(car 1, traffic light",
    "masks-datumaro-cityscapes": "names end with _gtFine_labelIds",
    "masks-datumaro-voc": "without a mask were left out: 1 .*empty",
    "masks-labelformat": "names .* are those of .*class_id_to_name.json",
    "voc-datumaro": "without an xml file, taken as empty: 1 .*empty.png",
    "voc-globox": "counting pixels from 0, far edges are outside",
    "voc-label-studio": "without an xml file, taken as empty: 1 .*empty.png",
    "voc-labelimg": "without an xml file, taken as empty: 1 .*empty.png",
    "voc-supervision": "counting pixels from 1 and both ends are inside",
    "yolo-labelimg": "classes without an object: dog, person",
    "yolo-labelme2yolo": "not there: 1 .*val: images/val",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    with tarfile.open(ARCHIVE) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(path, filter="data")
        else:
            archive.extractall(path)
    return path


def source_of(form, reading, folder):
    if form == "voc":
        part = reading.get("split")
        return f"voc:{folder}" + (f":{part}" if part else "")
    if form == "coco":
        file, images = folder / reading["file"], folder / reading["images"]
        return f"coco:{file},{images}"
    if form == "masks":
        images, labels = folder / reading["images"], folder / reading["labels"]
        return f"masks:{images},{labels}"
    return f"yolo:{folder}"


def options_of(expected):
    """Returns options without which the set is read, and those it needs."""
    options, needed = {}, dict(expected.get("with_option", {}))
    if expected["form"] == "voc":
        options["base"] = expected["read"]["base"]
    if expected.get("no_names"):
        needed["classes"] = list(expected["ids"])
    if "colours" in expected:
        needed["colours"] = {
            int(key): colour for key, colour in expected["colours"].items()
        }
    if "image_suffix" in expected["read"]:  # The form has no names.
        options["classes"] = expected["classes"]
    return options, needed


def image_name(photograph, expected):
    suffix = expected["read"].get("image_suffix", ".png")
    name = pathlib.Path(photograph.path).name
    return name.removesuffix(suffix) + ".png"


def crowds_of(name, expected):
    """Returns the crowds that the file, and not the drawing, tells."""
    images = expected["images"]
    crowds = {image: list(images[image]["crowd"]) for image in images}
    for key in ("iscrowd_in_file", "crowd_in_attributes"):
        for image, place in expected.get(key, []):
            crowds[image][place] = 1
    return crowds[name]


def check_boxes(photograph, expected, crowds, classes):
    """Checks a photograph's objects in any order."""
    left = list(range(len(photograph.labels)))
    for box, label, crowd, difficult, tolerance in zip(
        expected["boxes"],
        expected["labels"],
        crowds,
        expected["difficult"],
        expected["tolerance"],
        strict=True,
    ):
        (found,) = [
            i
            for i in left
            if classes[photograph.labels[i]] == label
            and np.all(np.abs(photograph.boxes[i] - box) <= tolerance)
        ]
        left.remove(found)
        assert photograph.crowd[found] == crowd
        assert photograph.difficult[found] == difficult
    assert not left


def check_mask(photograph, expected, exact):
    mask = data.read_mask(photograph.mask)
    assert mask.shape == (photograph.height, photograph.width, 1)
    assert mask.dtype == np.int32
    if exact:
        ids, counts = np.unique(mask, return_counts=True)
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
            int(key): count for key, count in expected["pixels"].items()
        }
    for x, y, label in expected["probes"]:
        assert mask[y, x, 0] == label


def test_there_are_forty():
    assert len(NAMES) == 40
    assert {*REFUSED, *NOTED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_tool(name, folder):
    expected = json.loads((folder / name / "expected.json").read_text())
    source = source_of(expected["form"], expected["read"], folder / name)
    options, needed = options_of(expected)
    assert (name in REFUSED) == bool(
        "refuse" in expected or expected.get("no_names")
    )
    if name in REFUSED:
        with pytest.raises(ValueError) as error:
            data.read(source, **options)
        assert re.search(REFUSED[name], str(error.value), re.DOTALL)
        if not needed:
            return
    result = data.read(source, **options, **needed)
    names = {image_name(x, expected): x for x in result.photographs}
    assert len(names) == len(result.photographs)
    assert names.keys() == expected["images"].keys()
    if expected["form"] == "voc":
        assert set(result.classes) == set(expected["classes"])
    else:
        wanted = expected["classes"] or list(expected["ids"])
        assert list(result.classes) == wanted
    for image, drawn in expected["images"].items():
        photograph = names[image]
        assert [photograph.width, photograph.height] == drawn["size"]
        if expected["form"] == "masks":
            check_mask(photograph, drawn, expected.get("exact", True))
        else:
            crowds = crowds_of(image, expected)
            check_boxes(photograph, drawn, crowds, result.classes)
    notes = "\n".join(result.notes)
    assert re.search(NOTED.get(name, ""), notes), notes
    assert ("were dropped" in notes) == ("repeated_annotations" in expected)


def test_crowds_are_taken_as_objects_if_asked(folder):
    path = folder / "coco-supervision-masks"
    result = data.read(
        f"coco:{path}/annotations.json,{path}/images", crowds="objects"
    )
    assert not any(x.crowd.any() for x in result.photographs)
    assert r"crowds, taken as objects: 2" in "\n".join(result.notes)
