# SPDX-License-Identifier: Apache-2.0
"""Tests odd and broken xml and json files, and boxes.

A fault is put into the annotations of the image `a` of three.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from faults import Fault, check, rows
from small_sets import (
    OBJECTS,
    SIZES,
    coco,
    object_xml,
    picture,
    write_json,
    xml,
    yolo,
)

BOXES = "voc coco yolo"
FIRST = OBJECTS["a"][0][1]
SECOND = OBJECTS["a"][1][1]


def text(content, encoding="utf-8"):
    """Returns a maker that replaces the xml file of `a`."""

    def make(root, form):
        data = (
            content if isinstance(content, bytes) else content.encode(encoding)
        )
        (root / "a.xml").write_bytes(data)

    return make


def xml_object(inner):
    return text(xml("a", [], more=f"<object>{inner}</object>"))


def changed(change):
    """Returns a maker that changes COCO's json."""

    def make(root, form):
        content = coco()
        result = change(content)
        write_json(root, result if isinstance(result, dict) else content)

    return make


def raw(content):
    def make(root, form):
        data = content if isinstance(content, bytes) else content.encode()
        (root / "labels.json").write_bytes(data)

    return make


def update(place=0, key="annotations", **fields):
    return changed(lambda content: content[key][place].update(fields))


def without(key, field, place=0):
    return changed(lambda content: content[key][place].pop(field))


def edges(*values):
    """Returns a maker that gives the first object of `a` other edges."""

    def make(root, form):
        x1, y1, x2, y2 = values
        if form == "voc":
            objects = [("car", values), OBJECTS["a"][1]]
            (root / "a.xml").write_text(xml("a", objects))
        elif form == "coco":
            update(bbox=[x1, y1, x2 - x1, y2 - y1])(root, form)
        else:
            width, height = SIZES["a"]
            line = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height]
            line += [(x2 - x1) / width, (y2 - y1) / height]
            lines = yolo("a").splitlines()
            lines[0] = " ".join(map(str, (0, *line)))
            (root / "labels/a.txt").write_text("\n".join(lines))

    return make


def one(value):
    """Returns a maker that writes something else for the number xmin."""

    def make(root, form):
        if form == "voc":
            edges(value, *FIRST[1:])(root, form)
        elif form == "coco":
            update(bbox=[value, 1, 2, 3])(root, form)
        else:
            (root / "labels/a.txt").write_text(f"0 {value} 0.5 0.5 0.5\n")

    return make


def shares(root, form):
    """Writes all boxes as shares of the width and height."""
    if form == "voc":
        for name, objects in OBJECTS.items():
            new = [
                (label, np.divide(box, SIZES[name] * 2).tolist())
                for label, box in objects
            ]
            (root / f"{name}.xml").write_text(xml(name, new))
        return
    content = coco()
    sides = {x["id"]: (x["width"], x["height"]) for x in content["images"]}
    for x in content["annotations"]:
        x["bbox"] = np.divide(x["bbox"], sides[x["image_id"]] * 2).tolist()
    write_json(root, content)


def in_annotations(root, form):
    """Moves the file into COCO's own layout."""
    path = root / "annotations/instances_val.json"
    path.parent.mkdir()
    (root / "labels.json").rename(path)
    return f"coco:{path}"


def masks_among_labels(root, form):
    """Puts a mask of the image's name into a folder `labels` beside."""
    (root / "labels").mkdir()
    picture("a", "L").save(root / "labels/a.png")
    return in_annotations(root, form)


@changed
def panoptic(content):
    for x in content["annotations"]:
        segment = {"id": x.pop("id"), "category_id": x.pop("category_id")}
        x["segments_info"] = [segment]


@changed
def images_by_name(content):
    for x in content["annotations"]:
        x["image_id"] = "a.png"


def repeated(root, form):
    if form == "voc":
        (root / "a.xml").write_text(xml("a", OBJECTS["a"] + OBJECTS["a"][:1]))
    elif form == "coco":
        content = coco()
        content["annotations"].append({**content["annotations"][0], "id": 77})
        write_json(root, content)
    else:
        lines = yolo("a")
        (root / "labels/a.txt").write_text(lines + lines.splitlines()[0])


def boxes(*wanted):
    def see(found):
        np.testing.assert_allclose(
            found["a"].boxes, np.reshape(wanted, (-1, 4)), atol=1e-5
        )

    return see


def twice(root, form):
    """Lists an image once more, with one object of its own."""
    content = coco()
    content["images"].append({**content["images"][0], "id": 99})
    content["annotations"].append(
        {**content["annotations"][0], "image_id": 99, "id": 98}
    )
    write_json(root, content)


def file_name(name, *folders):
    """Returns a maker that moves `a.png` to folders and calls it `name`."""

    def make(root, form):
        update(key="images", file_name=name)(root, form)
        for folder in folders:
            path = root / "images" / folder / pathlib.PureWindowsPath(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "images/a.png", path)
        if folders:
            (root / "images/a.png").unlink()

    return make


def moved(name, folder=None):
    """Returns a maker that puts the xml or image of `a` elsewhere."""

    def make(root, form):
        path = root / (folder or "") / name
        path.parent.mkdir(exist_ok=True)
        (root / ("a" + path.suffix)).rename(path)

    return make


def two_images(content):
    def make(root, form):
        picture("a").save(root / "a.jpg", "JPEG")
        (root / "a.xml").write_text(content)

    return make


def beside_coco(root, form):
    """Puts COCO's folder beside the xml files, as for the same images."""
    (root / "annotations").mkdir()
    (root / "annotations/train.json").write_text(json.dumps(coco()))


def no_xml(root, form):
    for path in root.glob("*.xml"):
        path.unlink()


def no_objects(root, form):
    for name in SIZES:
        (root / f"{name}.xml").write_text(xml(name, []))


def other_images(folder):
    """Returns a maker that puts pictures of the same name beside."""

    def make(root, form):
        (root / folder).mkdir(exist_ok=True)
        picture("a").save(root / folder / "a.png")

    return make


def listed(content):
    def make(root, form):
        folder = root / "ImageSets/Main"
        folder.mkdir(parents=True)
        (folder / "part.txt").write_text(content)
        return f"voc:{root}:part"

    return make


BOMB = (
    '<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa">'
    + "".join(
        f'<!ENTITY {chr(b)} "{("&" + chr(b - 1) + ";") * 10}">'
        for b in range(98, 108)
    )
    + "]>"
)
OUTER = '<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
ENCODED = '<?xml version="1.0" encoding="{}"?>'
POLYGON = [[3, 4, 9, 4, 9, 11], [2, 3, 5, 6, 7, 8]]
MISSING = coco()
del MISSING["categories"]

BOX_FAULTS = [
    Fault(
        "box beyond the image",
        BOXES,
        edges(-3, 2, 30, 20),
        "kept",
        "beyond their image and were clipped: 1 .*a.png",
        check=boxes((0, 2, 24, 16), SECOND),
    ),
    Fault(
        "box beyond the image by rounding",
        BOXES,
        edges(0, 0, 24.3, 16.1),
        "kept",
        r"\A(?!.*clipped)",
        check=boxes((0, 0, 24, 16), SECOND),
    ),
    Fault(
        "box outside the image",
        BOXES,
        edges(25, 2, 30, 10),
        "kept",
        "outside their image were dropped: 1 .*a.png",
        check=boxes(SECOND),
    ),
    Fault(
        "box with exchanged edges",
        BOXES,
        edges(10, 12, 2, 3),
        "kept",
        "exchanged edges, .* order: 1 .*a.png",
        check=boxes((2, 3, 10, 12), SECOND),
    ),
    Fault(
        "box without width",
        BOXES,
        edges(5, 3, 5, 12),
        "kept",
        "without width or height were dropped: 1 .*a.png",
        check=boxes(SECOND),
    ),
    Fault(
        "box of one pixel",
        BOXES,
        edges(5, 3, 6, 4),
        "kept",
        check=boxes((5, 3, 6, 4), SECOND),
    ),
    Fault(
        "object twice",
        BOXES,
        repeated,
        "kept",
        "repeat another in all fields were dropped: 1 .*a.png",
        check=boxes(FIRST, SECOND),
    ),
    *(
        Fault(f"number {value}", BOXES, one(value), "broken", "a finite number")
        for value in ("nan", "inf", "1e999", "12,5", "1_0", "0x1", "ten")
    ),
    Fault("shares in place of pixels", "voc coco", shares, "refused",
          "in pixels. Received: .*shares of width and height, first in .*png"),
]  # fmt: skip
COCO_FAULTS = [
    Fault("json list", "coco", raw("[]"), "refused", "Received: list"),
    Fault("json cut", "coco", raw(json.dumps(coco())[:99]), "refused", "json"),
    Fault("json of no bytes", "coco", raw(""), "refused", "to be json"),
    Fault("json in Latin-1", "coco", raw('{"é": 1}'.encode("latin-1")),
          "refused", "labels.json to be json"),
    Fault("json of 100 000 brackets", "coco", raw("[" * 100_000), "refused",
          "labels.json to be json"),
    Fault("json with a mark before it", "coco",
          raw(b"\xef\xbb\xbf" + json.dumps(coco()).encode()), "kept"),
    Fault("json without categories", "coco", changed(lambda _: MISSING),
          "refused", "'categories'. Received: no such key"),
    Fault("json with null annotations", "coco",
          changed(lambda c: {**c, "annotations": None}), "refused",
          "annotations of another kind, None"),
    Fault("json without images", "coco",
          changed(lambda c: {**c, "images": [], "annotations": []}), "refused",
          "labels.json to list images. Received: none"),
    Fault("category id twice", "coco", update(1, "categories", id=3), "refused",
          "category id 3 twice: car, dog"),
    Fault("category without a name", "coco", update(1, "categories", name=""),
          "refused", "category id 4 without a name"),
    Fault("category name twice", "coco",
          changed(lambda c: c["categories"].append({"id": 9, "name": "car"})),
          "kept", "share a name and were joined: 1 .car."),
    Fault("category id as text", "coco", update(0, "categories", id="3"),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("unknown category", "coco", update(category_id=55), "refused",
          r"categories, 3, 4. Received: category_id 55 \(1 times\)"),
    Fault("categories empty", "coco",
          changed(lambda c: c["categories"].clear()), "refused",
          r"categories, of which it lists none. Received: category_id 3"),
    Fault("image id twice", "coco", update(1, "images", id=7), "refused",
          "image id 7 twice: a.png, b.png"),
    Fault("image without an id", "coco", without("images", "id"), "refused",
          "image's id in .*labels.json"),
    Fault("annotation ids that repeat", "coco", update(id=1), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("annotation without id, area, iscrowd", "coco",
          changed(lambda c: [c["annotations"][0].pop(k)
                             for k in ("id", "area", "iscrowd")]),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("annotation of an unlisted image", "coco", update(image_id=1234),
          "kept", "does not list were dropped: 1 .image id 1234",
          check=boxes(SECOND)),
    Fault("image listed twice", "coco", twice, "kept",
          "listed more than once.*: 1 .*a.png", check=boxes(FIRST, SECOND)),
    Fault("annotations of names", "coco", images_by_name, "refused",
          "image ids of its images, as 7. Received: 'a.png'"),
    Fault("image id that lost its last digits", "coco",
          update(image_id=2.0**53 + 8), "refused",
          "image_id in .* to be a whole number or text. Received: 9007199"),
    Fault("category name of a list", "coco",
          update(1, "categories", name=["dog"]), "refused", "without a name"),
    Fault("polygon that is no list of polygons", "coco",
          update(bbox=None, segmentation=[2, 3, 9, 3, 9, 11]), "kept",
          check=boxes((2, 3, 9, 11), SECOND)),
    Fault("polygon with an empty part", "coco",
          update(bbox=None, segmentation=[*POLYGON, []]), "kept",
          check=boxes((2, 3, 9, 11), SECOND)),
    Fault("encoded mask without a box", "coco",
          update(bbox=None, segmentation={"counts": "01", "size": [16, 24]}),
          "broken", "or polygons as .segmentation.. Received: None"),
    Fault("polygon without a box", "coco",
          update(bbox=[], segmentation=POLYGON), "kept",
          check=boxes((2, 3, 9, 11), SECOND)),
    Fault("box before polygon", "coco", update(segmentation=POLYGON), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("box null", "coco", update(bbox=None), "broken", "list of x, y"),
    Fault("box of three numbers", "coco", update(bbox=[1, 2, 3]), "broken",
          "list of x, y, width and height.*Received: .1, 2, 3."),
    Fault("box of true and false", "coco", update(bbox=[True, 0, 1, 2]),
          "broken", "finite number. Received: True"),
    Fault("box of numbers as text", "coco", update(bbox=["2", "3", "8", "9.0"]),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("iscrowd maybe", "coco", update(iscrowd="maybe"), "broken", "crowd"),
    Fault("ignore, which evaluations would count", "coco", update(ignore=1),
          "kept", r"difficult objects, left out of .*: 1 \(car 1",
          check=boxes(FIRST, SECOND)),
    Fault("no file name", "coco", without("images", "file_name"), "broken",
          "a file_name. Received: None"),
    Fault("file name of half a character", "coco", file_name("\ud800.png"),
          "broken", "no file of this name"),
    Fault("file name of a folder", "coco", file_name("."), "broken",
          "a folder"),
    Fault("file name with a null", "coco", file_name("a\0.png"), "broken",
          "no file of this name"),
    Fault("path of Windows", "coco", file_name(r"C:\photos\a.png", "x"), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("path of another machine, name twice", "coco",
          file_name("/home/x/one/a.png", "one", "two"), "kept",
          check=lambda found: "/one/" in found["a"].path or pytest.fail()),
    Fault("name twice", "coco", file_name("a.png", "one", "two"), "broken",
          "one/a.png, two/a.png. Of COCO, coco:FILE,IMAGES names"),
    Fault("address with escapes", "coco",
          file_name("http://localhost/images/%61.png"), "kept"),
    Fault("address with a query", "coco",
          file_name("https://x.org/%61.png?a=b/c.png&d#e/f"), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("path out of the folder and back", "coco",
          file_name("../images/a.png"), "kept", r"(?s)\A(?!.*left out)",
          check=boxes(FIRST, SECOND)),
    Fault("file in a folder of annotations", "coco", in_annotations, "kept",
          check=boxes(FIRST, SECOND)),
    Fault("mask of the image's name among labels", "coco", masks_among_labels,
          "kept", "does not list were left out: 1 .labels/a.png",
          check=boxes(FIRST, SECOND)),
    Fault("panoptic form", "coco", panoptic, "refused",
          "labels.json to be .*Received: segments_info, COCO's panoptic form"),
    Fault("name in capitals", "coco", file_name("A.PNG"), "kept"),
    Fault("size missing", "coco", without("images", "width"), "kept"),
    Fault("size of 100 million pixels", "coco",
          update(0, "images", width=10**8), "broken",
          "to have 1e.08x16 pixels, .* Received: 24x16"),
]  # fmt: skip
VOC_FAULTS = [
    Fault("xml of no bytes", "voc", text(""), "broken", "well-formed xml"),
    Fault("xml cut", "voc", text(xml("a")[:90]), "broken", "well-formed xml"),
    Fault("xml with a bare &", "voc", xml_object("<name>a & b</name>"),
          "broken", "well-formed"),
    Fault("xml of a page", "voc", text("<html></html>"), "broken", "<html>"),
    Fault("entities that grow", "voc", text(BOMB + xml("a")), "broken",
          "without entities"),
    Fault("entity of a file", "voc", text(OUTER + xml("a")), "broken",
          "without entities"),
    Fault("xml in GBK", "voc",
          text(ENCODED.format("GBK") + xml("a", more="<x>车</x>"), "gbk"),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("xml in UTF-16", "voc", text(ENCODED.format("UTF-16") + xml("a"),
          "utf-16"), "kept", check=boxes(FIRST, SECOND)),
    Fault("xml in an unknown encoding", "voc",
          text(ENCODED.format("martian") + xml("a")), "broken", "encoding"),
    Fault("xml that is not in its encoding", "voc",
          text(ENCODED.format("UTF-8") + xml("a", more="<x>é</x>"), "latin-1"),
          "broken", "well-formed"),
    Fault("object without a name", "voc",
          xml_object("<bndbox><xmin>1</xmin></bndbox>"), "broken", "name ''"),
    Fault("object without a box", "voc", xml_object("<name>car</name>"),
          "broken", "'car', 0 boxes"),
    Fault("objects below another element", "voc", text(xml("a").replace(
          "<object>", "<objects><object>", 1).replace(
          "</annotation>", "</objects></annotation>")), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("box without an object", "voc",
          text(xml("a", [], more="<box><bndbox/></box>")), "broken",
          "a bndbox outside"),
    Fault("object of other fields in the same box", "voc",
          text(xml("a", more=object_xml("car", FIRST, "<pose>Left</pose>"))),
          "kept", "class and box of another were kept: 1 .*a.png",
          check=boxes(FIRST, FIRST, SECOND)),
    Fault("box without an edge", "voc",
          xml_object("<name>car</name><bndbox><xmin>1</xmin></bndbox>"),
          "broken", "ymin to be a finite number. Received: ''"),
    Fault("part of an object with a box of its own", "voc",
          text(xml("a", more=object_xml(
              "car", FIRST, "<part><name>head</name><bndbox/></part>"))),
          "kept", check=boxes(FIRST, FIRST, SECOND)),
    Fault("size of 0", "voc", text(xml("a", size=(0, 0))), "kept"),
    Fault("size empty", "voc", text(xml("a", size=("", ""))), "kept"),
    Fault("size of 10^12", "voc", text(xml("a", size=(10**12, 10**12))),
          "broken", "Received: 24x16"),
    Fault("difficult empty", "voc",
          text(xml("a", [], more=object_xml("car", FIRST, "<difficult/>"))),
          "kept", check=boxes(FIRST)),
    Fault("difficult maybe", "voc",
          text(xml("a", [], more=object_xml(
              "car", FIRST, "<difficult>maybe</difficult>"))),
          "broken", "difficult"),
    Fault("another name for a file name", "voc",
          text(xml("a").replace("a.png", "zebra.png")), "kept",
          "name of their xml file, which names another: 1 .*a.png"),
    Fault("another name for the xml", "voc", moved("zebra.xml"), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("image without an xml", "voc",
          lambda root, form: (root / "a.xml").unlink(), "kept",
          "without an xml file, taken as empty: 1 .*a.png", check=boxes()),
    Fault("folder named xml", "voc",
          lambda root, form: [(root / "a.xml").unlink(),
                              (root / "a.xml").mkdir()] and None,
          "broken", "a.xml', which is a folder"),
    Fault("two images of one name, one told", "voc", two_images(xml("a")),
          "kept", "share the name .* left out: 1 .*a.png"),
    Fault("two images of one name", "voc",
          two_images(xml("a").replace("a.png", "")), "broken",
          "a.xml: .* Received: a.jpg, a.png"),
    Fault("xml files in folders of their own", "voc", moved("a.xml", "labels"),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("folder of COCO's annotations", "voc", beside_coco, "kept",
          check=boxes(FIRST, SECOND)),
    Fault("masks of the same names", "voc", other_images("SegmentationClass"),
          "kept", r"(?s)\A(?!.*left out)", check=boxes(FIRST, SECOND)),
    Fault("masks among the labels", "voc yolo", other_images("labels"), "kept",
          "without an annotated image were left out: 1 .*labels/a.png"),
    Fault("pictures in another folder", "voc yolo", other_images("runs"),
          "kept", "without an annotated image were left out: 1 .*runs/a.png"),
    Fault("no xml at all", "voc", no_xml, "refused", "xml files in"),
    Fault("no object at all", "voc", no_objects, "refused", "at least one obj"),
    Fault("from 1", "voc", edges(1, 1, 24, 16), "kept", "from 1 and both",
          {"base": 1}, boxes((0, 0, 24, 16), (10, 0, 23, 15))),
    Fault("from 0 read as from 1", "voc", edges(0, 3, 9, 9), "kept",
          "seem to count from 0.*a.png", {"base": 1},
          boxes((0, 2, 9, 9), (10, 0, 23, 15))),
    Fault("list of images", "voc", listed("a\nc\na\n"), "kept",
          check=lambda found: found.keys() == {"a", "c"} or pytest.fail()),
    Fault("list of one class, with endings", "voc",
          listed("a.png -1\r\nb  1\n"), "kept",
          check=lambda found: found.keys() == {"a", "b"} or pytest.fail()),
    Fault("list that names no image", "voc", listed("b\nc\nzebra\n"), "broken",
          "zebra"),
    Fault("no list", "voc", lambda root, form: f"voc:{root}:part", "refused",
          "list part.txt"),
]  # fmt: skip


@pytest.mark.parametrize("form, fault", rows(BOX_FAULTS))
def test_a_box(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")


@pytest.mark.parametrize("form, fault", rows(COCO_FAULTS))
def test_coco(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")


@pytest.mark.parametrize("form, fault", rows(VOC_FAULTS))
def test_voc(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")
