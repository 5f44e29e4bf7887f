#!/bin/sh
# Supervisely's Pascal VOC export puts the masks of objects where those of classes are.
#
# Surprise: `supervisely.convert.to_pascal_voc` writes folders as VOC has them, so one
# expects `SegmentationClass` to give all cars one colour, that of colors.txt, and
# `SegmentationObject` to tell them apart. It is the other way round: class masks have a
# new colour for each object, and none of colors.txt. All masks are palette images, too,
# as VOC's are, but each with a palette of its own: index 1 is a car in one file and a
# tree in the next, so that whoever trains on the indices trains on noise.
#
# Versions: see pip below (lxml is needed, but not required by the package). Source: this
# program; the documentation of VOC's devkit, which describes both folders.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q supervisely==6.74.51 lxml==6.0.2
cat > "$folder/run.py" <<'PYTHON'
import pathlib
import sys

import numpy as np
import supervisely as sly
from PIL import Image

folder = pathlib.Path(sys.argv[1])
RED, BLUE, EDGE = (255, 0, 0), (0, 0, 255), (224, 224, 192)
car = sly.ObjClass("car", sly.Polygon, color=list(RED))
tree = sly.ObjClass("tree", sly.Polygon, color=list(BLUE))
photo = np.full((64, 96, 3), 120, np.uint8)


def square(left, top, kind):
    corners = [(top, left), (top, left + 30), (top + 24, left + 30)]
    corners.append((top + 24, left))
    points = [sly.PointLocation(row, column) for row, column in corners]
    return sly.Label(sly.Polygon(points), kind)


project = sly.Project(str(folder / "project"), sly.OpenMode.CREATE)
project.set_meta(sly.ProjectMeta(obj_classes=[car, tree]))
photos = project.create_dataset("photos")
objects = {
    "a.png": [square(4, 4, car), square(50, 30, car)],
    "b.png": [square(50, 30, tree)],
}
for name, labels in objects.items():
    annotation = sly.Annotation(photo.shape[:2], labels)
    photos.add_item_np(name, photo, ann=annotation)
sly.convert.to_pascal_voc(project, dest_dir=str(folder / "voc"))

masks = {
    (path.parent.name, path.name[7]): Image.open(path)
    for path in (folder / "voc").glob("**/Segmentation*/*.png")
}
colours = {
    key: {colour for _, colour in image.convert("RGB").getcolors()}
    - {(0, 0, 0), EDGE}
    for key, image in masks.items()
}
for key in sorted(colours):
    print(*key, masks[key].mode, "colours of objects:", sorted(colours[key]))
middle = {
    name: masks["SegmentationObject", name].getpixel((65, 42)) for name in "ab"
}
print("index of the right object, a car in a and a tree in b:", middle)
swapped = (
    len(colours["SegmentationClass", "a"]) == 2
    and not colours["SegmentationClass", "a"] & {RED, BLUE}
    and colours["SegmentationObject", "a"] == {RED}
    and colours["SegmentationObject", "b"] == {BLUE}
)
if not swapped or middle["a"] != middle["b"]:
    sys.exit("something else than before")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null
