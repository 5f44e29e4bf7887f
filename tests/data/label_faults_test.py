# SPDX-License-Identifier: Apache-2.0
"""Tests odd and broken text files of YOLO, and masks.

A fault is put into the labels of the image `a` of three.
"""

import json

import numpy as np
import pytest
from faults import Fault, check, rows
from PIL import Image
from small_sets import CLASSES, OBJECTS, SIZES, mask, write_mask, yolo

from tf_deform import data

FIRST = OBJECTS["a"][0][1]
SECOND = OBJECTS["a"][1][1]
WIDTH, HEIGHT = SIZES["a"]


def boxes(*wanted):
    def see(found):
        np.testing.assert_allclose(
            found["a"].boxes, np.reshape(wanted, (-1, 4)), atol=1e-4
        )

    return see


def text(content, name="labels/a.txt", encoding="utf-8"):
    def make(root, form):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(encoding))

    return make


def gone(*names):
    def make(root, form):
        for name in names:
            (root / name).unlink()

    return make


def several(*makers):
    def make(root, form):
        for maker in makers:
            result = maker(root, form)
        return result

    return make


def yaml(content):
    return text(content, "data.yaml")


def names(content):
    """Returns a maker that tells the names by a classes.txt alone."""
    return several(gone("data.yaml"), text(content, "classes.txt"))


def beside(root, form):
    """Puts the labels beside the images, as labelImg does."""
    for name in SIZES:
        path = root / f"labels/{name}.txt"
        path.rename(root / f"images/{name}.txt")


def parts(root, form):
    """Makes two parts with an image `a` each."""
    for part, name in (("train", "b"), ("valid", "c")):
        for kind, ending in (("images", "png"), ("labels", "txt")):
            folder = root / part / kind
            folder.mkdir(parents=True)
            (root / f"{kind}/{name}.{ending}").rename(folder / f"a.{ending}")
    for ending in ("images/a.png", "labels/a.txt"):
        (root / ending).unlink()
    text(
        "train: ../train/images\nval: ../valid/images\nnames: [car, dog]\n",
        "data.yaml",
    )(root, form)


def part(name):
    return several(parts, lambda root, form: f"yolo:{root}:{name}")


def sizes(*wanted):
    def see(found):
        (photograph,) = found.values()
        assert (photograph.width, photograph.height) in wanted

    return see


LINES = yolo("a")
POINTS = " ".join(
    str(v)
    for x, y in ((2, 3), (10, 3), (10, 12), (2, 12))
    for v in (x / WIDTH, y / HEIGHT)
)
ROTATED = LINES.splitlines()[0] + "\n1 " + POINTS
POSE = LINES.splitlines()[0] + " 0.5 0.5 2 0.1 0.1 1\n"
YOLO_FAULTS = [
    Fault("line of four numbers", "yolo", text("0 .5 .5 .5"), "broken",
          "a.txt, line 1: .* Received: 3"),
    Fault("line with a confidence", "yolo", text(LINES + "0 .5 .5 .5 .5 .9"),
          "broken", "a.txt, line 3: .*confidence"),
    Fault("line of an odd count", "yolo", text("0 .1 .1 .2 .2 .3 .3 .4"),
          "broken", "Received: 7"),
    Fault("line of points", "yolo", text(ROTATED), "kept",
          check=boxes(FIRST, FIRST)),
    Fault("line of a pose", "yolo", several(text(POSE), yaml(
          "kpt_shape: [2, 3]\nnames: [car, dog]")), "kept", check=boxes(FIRST)),
    Fault("line of a pose that data.yaml does not tell", "yolo", text(POSE),
          "broken", "a.txt, line 1: .*kpt_shape"),
    Fault("pixels in place of shares", "yolo", text("0 12 8 10 6"), "broken",
          "from 0 to 1.*Received: '0 12 8 10 6'"),
    Fault("class of a name", "yolo", text("car .5 .5 .5 .5"), "broken",
          "class id to be a finite number. Received: 'car'"),
    Fault("class of a half", "yolo", text("0.5 .5 .5 .5 .5"), "broken",
          "an integer"),
    Fault("class as 1.0", "yolo", text("1.0 .5 .5 .5 .5"), "kept",
          check=lambda found: found["a"].labels.tolist() == [1]
          or pytest.fail()),
    Fault("class -1", "yolo", text("-1 .5 .5 .5 .5"), "refused",
          "id -1 of 1 objects.*first_id=-1 reads"),
    Fault("classes from -1", "yolo", several(text("-1 .5 .5 .5 .5"), yaml(
          "names: [car, dog, cat]")), "kept", "car 1, cat 1",
          {"first_id": -1}),
    Fault("class without a name", "yolo", text("7 .5 .5 .5 .5"), "refused",
          "0: car, 1: dog. Received: id 7 of 1 objects, first in .*a.png"),
    Fault("commas", "yolo", text("0,.5,.5,.5,.5"), "broken", "finite number"),
    Fault("width of 1.2", "yolo", text("0 .5 .5 1.2 .5"), "kept",
          "clipped: 1", check=boxes((0, 4, 24, 12))),
    Fault("blank lines, tabs, a mark, line ends of Windows", "yolo",
          text("\ufeff" + LINES.replace(" ", "\t").replace("\n", "\r\n\r\n")),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("labels in UTF-16", "yolo", text(LINES, encoding="utf-16"), "kept",
          check=boxes(FIRST, SECOND)),
    Fault("labels in Latin-1", "yolo", text("é", encoding="latin-1"), "broken",
          "a.txt to be text in UTF-8"),
    Fault("labels of blanks", "yolo", text("   "), "kept",
          r"without objects were kept: 2 .*a.png", check=boxes()),
    Fault("no labels", "yolo", gone("labels/a.txt"), "kept",
          "without a file of labels, taken as empty: 1 .*a.png", check=boxes()),
    Fault("labels beside images", "yolo", beside, "kept",
          check=boxes(FIRST, SECOND)),
    Fault("two files of labels", "yolo", text(LINES, "images/a.txt"), "broken",
          "one file of labels. Received: images/a.txt, labels/a.txt"),
    Fault("other texts", "yolo", several(
          text("Thanks to all\n", "README.txt"), text("", "labels/z.txt")),
          "kept", check=boxes(FIRST, SECOND)),
    Fault("no names", "yolo", gone("data.yaml"), "refused", "Received: none"),
    Fault("names given", "yolo", gone("data.yaml"), "kept", "car 1, dog 2",
          {"classes": CLASSES}),
    Fault("names from 1", "yolo", yaml("names: [cat, car, dog]"), "refused",
          "id 0 of 1 objects", {"first_id": 1}),
    Fault("names by id", "yolo", yaml("names: {1: dog, 0: car, 9: cat}\nnc: 2"),
          "kept", "classes without an object: cat", check=boxes(FIRST, SECOND)),
    Fault("names of yes and no", "yolo", yaml("names: [yes, no]"), "kept",
          "yes 1, no 2"),
    Fault("names of two files", "yolo", text("dog\ncar\n", "classes.txt"),
          "refused", "tell the same names.*data.yaml: .*classes.txt: "),
    Fault("name twice", "yolo", names("car\ncar\n"), "refused",
          "different names"),
    Fault("blank name", "yolo", names("car\n\ndog\n"), "refused",
          "classes.txt. Received: a blank line 2"),
    Fault("names of numbers", "yolo", names("1\n#2\n"), "kept", "1 1, #2 2"),
    Fault("names after their ids", "yolo", names("0 car\n1: dog\n"), "kept",
          "car 1, dog 2"),
    Fault("names that begin with numbers", "yolo", names("1 euro\n2 euro\n"),
          "kept", "1 euro 1, 2 euro 2"),
    Fault("names among the labels", "yolo", several(
          gone("data.yaml"), text("car\ndog", "labels/darknet.labels")),
          "kept", "car 1, dog 2"),
    Fault("names of a classification.txt", "yolo", several(
          gone("data.yaml"), text("car\ndog", "labels/classification.txt")),
          "kept", "car 1, dog 2"),
    Fault("first name without an object", "yolo", text("1 .5 .5 .5 .5"),
          "kept", "id 0, car: if ids begin at 1, first_id=1",
          check=boxes((6, 4, 18, 12))),
    Fault("yaml in a folder", "yolo", several(gone("data.yaml"), text(
          "train: ../images\nnames: [car, dog]", "job/data.yaml")), "kept",
          "car 1, dog 2", check=boxes(FIRST, SECOND)),
    Fault("yaml in two folders", "yolo", several(gone("data.yaml"), *(
          text("names: [car, dog]", f"{x}/data.yaml") for x in "uv")),
          "refused", "Received: none"),
    Fault("yaml of macOS", "yolo", text("\0\5", "._data.yaml"), "kept"),
    Fault("part of null", "yolo", yaml(
          "train: images\nval: null\ntest: ~\nnames: [car, dog]"), "kept",
          r"(?s)\A(?!.*not there)"),
    Fault("yaml cut", "yolo", yaml("names: [car, d"), "refused", "to be yaml"),
    Fault("yaml list", "yolo", yaml("- car\n- dog\n"), "refused", "keys and"),
    Fault("yaml of lists", "yolo", yaml("names: [[car], [dog]]"), "refused",
          "list of names"),
    Fault("yaml that makes objects", "yolo", yaml(
          "x: !!python/object/apply:os._exit [3]\nnames: [car, dog]"), "kept"),
    Fault("yaml of references", "yolo", yaml(
          "a: &a [x]\n" + "\n".join(
              f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join(['*' + chr(i)] * 9)}]"
              for i in range(97, 107)) + "\nnames: [car, dog]"), "kept"),
    Fault("yaml of 2 000 brackets", "yolo", yaml("names: " + "[" * 2_000),
          "refused", "to be yaml"),
    Fault("all parts", "yolo", parts, "kept",
          "all parts are read together: train 1, val 1",
          check=sizes(SIZES["b"], SIZES["c"])),
    Fault("one part", "yolo", part("train"), "kept", check=sizes(SIZES["b"])),
    Fault("part of another name", "yolo", part("val"), "kept",
          check=sizes(SIZES["c"])),
    Fault("no such part", "yolo", part("test"), "refused",
          "as train, val. Received: test"),
    Fault("part that is not there", "yolo", yaml(
          "train: /x/images\ntest: /x/t\nnames: [car, dog]"), "kept",
          "not there: 1 .test: /x/t."),
]  # fmt: skip


def masked(pixels, palette=False):
    return lambda root, form: write_mask(root, "a", pixels, palette)


def all_masked(change):
    def make(root, form):
        for name in SIZES:
            write_mask(root, name, change(mask(name)), palette=False)

    return make


def saved(kind, mode="L", name="a.png", **options):
    def make(root, form):
        image = Image.fromarray(mask("a")).convert(mode)
        image.save(root / "masks" / name, kind, **options)

    return make


def renamed(pattern, *copies):
    def make(root, form):
        for name in SIZES:
            path = root / f"masks/{name}.png"
            for copy in copies:
                (root / "masks" / copy.format(name)).write_bytes(
                    path.read_bytes()
                )
            path.rename(root / "masks" / pattern.format(name))

    return make


def chosen(root, form):
    renamed("{}_ids.png", "{}_colour.png")(root, form)
    return f"masks:{root}/images/*.png,{root}/masks/*_ids.png"


def reindexed(root, form):
    """Writes palettes in the order in which colours are found in a file."""
    for name in SIZES:
        pixels = np.where(mask(name) == 255, 0, mask(name))
        ids = {"b": [1, 2, 0]}.get(name, [0, 1, 2])
        places = np.argsort(ids).astype(np.uint8)
        image = Image.fromarray(places[pixels])
        image.putpalette(coloured(np.array(ids)).tobytes())
        image.save(root / f"masks/{name}.png")


def among(pattern):
    """Puts masks into the folder of the images."""

    def make(root, form):
        for name in SIZES:
            path = root / f"masks/{name}.png"
            path.rename(root / f"images/{name}_mask.png")
        (root / "masks/names.json").rename(root / "images/names.json")
        folder = root / "images"
        labels = folder / pattern if pattern else folder
        return f"masks:{folder},{labels}"

    return make


def no_names(root, form):
    (root / "masks/names.json").unlink()


def told(content, name="masks/names.json"):
    return text(content, name)


def labels(*wanted):
    """Returns a check of the labels that are in the mask of `a`."""

    def see(found):
        ids = data.read_mask(found["a"].mask)
        assert np.unique(ids).tolist() == list(wanted)

    return see


def same(found):
    np.testing.assert_array_equal(
        data.read_mask(found["a"].mask)[..., 0], mask("a")
    )


def coloured(pixels):
    """Returns masks of Pascal VOC's colours for 0, 1, 2 and void."""
    table = np.zeros((256, 3), np.uint8)
    table[[1, 2, 255]] = (128, 0, 0), (0, 128, 0), (224, 224, 192)
    return table[pixels]


GREY4 = np.where(mask("a") == 255, 15, mask("a"))
CUT = mask("a")[:-1]
MAP = "ground:0,0,0::\ncar:128,0,0::\ndog:0,128,0::\nvoid:224,224,192::\n"
MASK_FAULTS = [
    Fault("sound", "masks", lambda root, form: None, "kept",
          "names of the classes are those of .*names.json", check=same),
    Fault("grey ids", "masks", masked(None), "kept", check=same),
    Fault("grey ids of 16 bits", "masks", masked(mask("a").astype(np.uint16)),
          "broken", "8 bits of grey. Received: .*I;16"),
    Fault("RGB without a table", "masks", masked(coloured(mask("a"))),
          "broken", "no table of `colours`"),
    Fault("RGB of VOC", "masks", all_masked(coloured), "kept",
          options={"colours": "voc"}, check=same),
    Fault("RGB with a table", "masks",
          several(all_masked(coloured), no_names, told(MAP, "labelmap.txt")),
          "kept", "without a pixel: |ground", check=labels(0, 1, 2, 3)),
    Fault("colour that the table lacks", "masks",
          several(all_masked(coloured), masked(coloured(mask("a")) + 1)),
          "broken", r"colours of the table. Received: \(1, 1, 1\) at row 0",
          options={"colours": "voc"}),
    Fault("grey and alpha", "masks", saved("PNG", "LA"), "broken", "mode 'LA"),
    Fault("JPEG", "masks", saved("JPEG"), "broken", "JPEG, which changes ids"),
    Fault("PNG of 4 bits of grey", "masks",
          lambda root, form: write_grey4(root / "masks/a.png"), "broken",
          "8 bits of grey. Received: Pillow's mode 'L;4'"),
    Fault("mask cut", "masks",
          lambda root, form: cut(root / "masks/a.png"), "broken",
          "masks/a.png to be a sound image"),
    Fault("one row less", "masks", masked(CUT), "broken", "24x15 .* 24x16"),
    Fault("id without a name", "masks", masked(mask("a") | 4), "refused",
          "0: ground, 1: car, 2: dog. Received: id 4, first in .*a.png"),
    Fault("no names", "masks", no_names, "kept", "by their ids, 0 to 2",
          check=same),
    Fault("names given", "masks", no_names, "kept", "earth", {
          "classes": ["earth", "car", "dog"]}, check=same),
    Fault("names in another order", "masks", lambda root, form: None, "kept",
          options={"classes": ["dog", "car", "ground"]},
          check=labels(0, 1, 2, 255)),
    Fault("too few names", "masks", no_names, "refused", "id 2, first in",
          {"classes": ["ground", "car"]}),
    Fault("names with gaps", "masks", several(
          told(json.dumps({7: "car", 0: "ground", 9: "dog", 255: "void"})),
          all_masked(lambda ids: np.array([0, 7, 9], np.uint8)[ids % 255])),
          "kept", r"(?s)\A(?!.*void)", check=labels(0, 1, 2)),
    Fault("0 and 255 alone", "masks",
          all_masked(lambda ids: np.where(ids, 255, 0).astype(np.uint8)),
          "refused", "0 and 255 alone.*colours={0: 0, 1: 255}"),
    Fault("0 and 255 as classes", "masks", several(no_names,
          all_masked(lambda ids: np.where(ids, 255, 0).astype(np.uint8))),
          "kept", options={"colours": {0: 0, 1: 255}}, check=labels(0, 1)),
    Fault("names of a csv", "masks", several(no_names, told(
          "Pixel Value, Class\n0, ground\n1, car\n2, dog\n255, void",
          "masks/_classes.csv")), "kept", "those of .*_classes.csv",
          check=same),
    Fault("colours of a csv", "masks", several(
          all_masked(coloured), no_names, told(
              "name,r,g,b\nground,0,0,0\ncar,128,0,0\ndog,0,128,0\n"
              "void,224,224,192\n", "class_dict.csv")),
          "kept", "ground [^0]", check=labels(0, 1, 2, 3)),
    Fault("colours in a column of a csv", "masks", several(
          all_masked(coloured), no_names, told(
              "class_name,class_color\nground,0 0 0\ncar,128 0 0\n"
              "dog,0 128 0\nvoid,224 224 192\n", "class_mapping.csv")),
          "kept", "ground [^0]", check=labels(0, 1, 2, 3)),
    Fault("csv of a class at 255", "masks", several(no_names, told(
          "class_name,class_color\nground,0\ncar,85\ndog,255\n",
          "class_mapping.csv"), all_masked(
              lambda ids: np.array([0, 85, 255], np.uint8)[ids % 255])),
          "kept", "dog [^0]", check=labels(0, 1, 2)),
    Fault("csv of images and classes", "masks", several(
          no_names, told("a.png,3\nb.png,4\n", "train_classes.csv")), "kept",
          "no file tells names", check=same),
    Fault("csv of 200 000 letters", "masks", several(
          no_names, told("a" * 200_000, "masks/class.csv")), "kept",
          "no file tells names", check=same),
    Fault("json of macOS", "masks", told("\0\5", "masks/._names.json"), "kept",
          check=same),
    Fault("palette of each file's own", "masks", reindexed, "refused",
          r"id 1 of \(128, 0, 0\) in .*a.png and of \(0, 128, 0\) in .*b.png"),
    Fault("palette of each file's own, read by colours", "masks", reindexed,
          "kept", options={"colours": "voc"}, check=labels(0, 1, 2)),
    Fault("masks among the images", "masks", among(""), "refused",
          "two folders, or patterns"),
    Fault("masks among the images, chosen", "masks", among("*_mask.png"),
          "kept", check=same),
    Fault("TIFF of a JPEG", "masks", several(
          gone("masks/a.png"), saved("TIFF", name="a.tif",
                                     compression="jpeg")),
          "broken", "a.tif .*JPEG, which changes ids"),
    Fault("no mask", "masks", gone("masks/a.png"), "kept",
          "images without a mask were left out: 1 .a.",
          check=lambda found: found.keys() == {"b", "c"} or pytest.fail()),
    Fault("one ending more", "masks", renamed("{}_mask.png"), "kept",
          "files whose names end with _mask", check=same),
    Fault("two endings", "masks", renamed("{}_ids.png", "{}_x.png"), "refused",
          "Received endings: '_ids', '_x'. A pattern"),
    Fault("two endings, one chosen", "masks", chosen, "kept", check=same),
    Fault("no name of an image", "masks", renamed("task-{}.png"), "refused",
          "Received endings: none"),
]  # fmt: skip


def write_grey4(path):
    """Writes a PNG of 4 bits of grey, which Pillow itself does not write."""
    from image_faults_test import png

    packed = GREY4[:, 0::2] << 4 | GREY4[:, 1::2]
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    path.write_bytes(png(WIDTH, HEIGHT, 4, 0, rows))


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("form, fault", rows(YOLO_FAULTS))
def test_yolo(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")


@pytest.mark.parametrize("form, fault", rows(MASK_FAULTS))
def test_masks(form, fault, tmp_path):
    check(form, fault, tmp_path / "set")


@pytest.mark.parametrize(
    "colours",
    ["VOC", 3, {0: (0, 0)}, {0: (0, 0, 256)}, {0: 1, 1: 1}, {256: 0}, {0: "a"}],
)
def test_wrong_colours_are_refused(colours, tmp_path):
    from small_sets import write_masks

    with pytest.raises(ValueError, match="Expected `colours` to be 'voc' or"):
        data.read(write_masks(tmp_path), colours=colours)
