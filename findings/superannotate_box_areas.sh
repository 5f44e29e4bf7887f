#!/bin/sh
# SuperAnnotate's COCO export gives boxes areas that are not width times height.
#
# Surprise: `superannotate.export_annotation` writes rectangles as COCO with right
# `bbox`, so one expects `area` to be width times height. It is (x2 - x1) * y2 - y1: the
# lower a box lies in the photograph, the larger its area. COCO's evaluation takes sizes
# from `area`, so small objects count as medium or large ones: here AP of small objects
# is -1, there are none, though all boxes have less than 32 x 32 pixels.
#
# Versions: see pip below. Source: this program; COCO's description of its format.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q superannotate==4.6.2 pycocotools==2.0.11
cat > "$folder/run.py" <<'PYTHON'
import json
import pathlib
import sys

import superannotate
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

folder = pathlib.Path(sys.argv[1])
drawn, written = folder / "drawn", folder / "written"
(drawn / "classes").mkdir(parents=True)
written.mkdir()
BOXES = [(10, 40, 30, 60), (100, 300, 125, 330), (400, 440, 430, 470)]
names = [{"name": "car", "id": 7, "color": "#ff0000", "attribute_groups": []}]
(drawn / "classes/classes.json").write_text(json.dumps(names))
Image.new("RGB", (640, 480)).save(drawn / "street.png")
cars = [
    {
        "type": "bbox",
        "classId": 7,
        "className": "car",
        "groupId": 0,
        "probability": 100,
        "attributes": [],
        "points": dict(zip(("x1", "y1", "x2", "y2"), box)),
    }
    for box in BOXES
]
street = {
    "metadata": {"name": "street.png", "width": 640, "height": 480},
    "instances": cars,
    "tags": [],
    "comments": [],
}
(drawn / "street.png___objects.json").write_text(json.dumps(street))
superannotate.export_annotation(
    str(drawn), str(written), "COCO", "photos", "Vector", "object_detection"
)
(path,) = (
    each
    for each in written.rglob("*.json")
    if "annotations" in json.loads(each.read_text())
)
found = json.loads(path.read_text())["annotations"]
areas = []
for annotation, (x1, y1, x2, y2) in zip(found, BOXES):
    assert [float(x) for x in annotation["bbox"]] == [x1, y1, x2 - x1, y2 - y1]
    areas.append(annotation["area"])
    print(f"{annotation['bbox']}: area {areas[-1]}, not {(x2 - x1) * (y2 - y1)}")
truth = COCO(str(path))
perfect = truth.loadRes(
    [
        {key: a[key] for key in ("image_id", "category_id", "bbox")}
        | {"score": 0.9}
        for a in found
    ]
)
judge = COCOeval(truth, perfect, "bbox")
judge.evaluate()
judge.accumulate()
judge.summarize()
wrong = [(x2 - x1) * y2 - y1 for x1, y1, x2, y2 in BOXES]
sys.exit(0 if areas == wrong and judge.stats[3] == -1 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
