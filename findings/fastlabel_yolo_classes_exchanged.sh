#!/bin/sh
# FastLabel's YOLO export with an order of classes writes names in another order.
#
# Surprise: `to_yolo` takes the classes in the order that their ids shall have, as a model
# in use needs it, and numbers the boxes so. But the list of names that it returns, and
# that `export_yolo` writes as classes.txt, is sorted by the alphabet. Whoever reads the
# labels by this list takes cars for traffic lights, and no error tells. Without an order
# of one's own both agree.
#
# Versions: see pip below. Source: this program.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fastlabel==0.26.0
cat > "$folder/run.py" <<'PYTHON'
import sys

from fastlabel import converters

boxes = [("car", [10, 10, 30, 30]), ("traffic light", [50, 5, 60, 40])]
tasks = [
    {
        "name": "street.png",
        "width": 100,
        "height": 80,
        "annotations": [
            {
                "type": "bbox",
                "value": name,
                "points": points,
                "attributes": [],
                "color": "#ff0000",
            }
            for name, points in boxes
        ],
    }
]


def read(order):
    """Returns the names of the two boxes, by the list that is returned."""
    labels, classes = converters.to_yolo("image_bbox", tasks, order, sys.argv[1])
    names = [each["name"] for each in classes]
    # Lines are sorted; the car is on the left.
    lines = sorted(labels[0]["object"], key=lambda line: float(line.split()[1]))
    ids = [int(line.split()[0]) for line in lines]
    print(f"order {order}: ids {ids}, names {names}")
    return [names[i] for i in ids]


right = [name for name, _ in boxes]
without = read([])
given = read(["traffic light", "car"])
print("drawn:", right, "read without an order:", without, "with one:", given)
sys.exit(0 if without == right and given == right[::-1] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
