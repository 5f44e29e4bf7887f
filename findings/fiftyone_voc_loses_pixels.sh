#!/bin/sh
# FiftyOne's Pascal VOC export moves edges on whole pixels by a pixel.
#
# Surprise: VOC's edges are whole pixels, so one expects FiftyOne to write the numbers
# that it read. It keeps edges as shares of the image, multiplies them again, and cuts
# off what follows the point: 55 of 61 rows become 54.999999, which becomes 54. In images
# of 640x480, one box in seven comes out a pixel narrower or lower (and boxes of one pixel
# without any). Rounding would give back what was read.
#
# Versions: see pip below. Needs no MongoDB, as no dataset is made: the importer and the
# exporter are called themselves. Source: this program.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" 2>/dev/null || python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fiftyone==1.22.1
cat > "$folder/run.py" <<'PYTHON'
import pathlib
import sys
from xml.etree import ElementTree

import fiftyone.utils.voc as voc
import numpy as np
from PIL import Image

folder = pathlib.Path(sys.argv[1])
EDGES = ("xmin", "ymin", "xmax", "ymax")
WIDTH, HEIGHT, COUNT = 640, 480, 1000
rng = np.random.default_rng(0)
xs = [sorted(rng.choice(WIDTH + 1, 2, replace=False)) for _ in range(COUNT)]
ys = [sorted(rng.choice(HEIGHT + 1, 2, replace=False)) for _ in range(COUNT)]
boxes = np.stack([xs, ys], axis=-1).reshape(COUNT, 4)

(folder / "in/data").mkdir(parents=True)
(folder / "in/labels").mkdir()
Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "in/data/a.png")
objects = "".join(
    "<object><name>car</name><bndbox>"
    + "".join(f"<{key}>{v}</{key}>" for key, v in zip(EDGES, box))
    + "</bndbox></object>"
    for box in boxes.tolist()
)
(folder / "in/labels/a.xml").write_text(
    f"<annotation><filename>a.png</filename><size><width>{WIDTH}</width>"
    f"<height>{HEIGHT}</height><depth>3</depth></size>{objects}</annotation>"
)

importer = voc.VOCDetectionDatasetImporter(str(folder / "in"))
exporter = voc.VOCDetectionDatasetExporter(str(folder / "out"))
with importer, exporter:
    for path, metadata, label in importer:
        exporter.export_sample(path, label, metadata=metadata)

root = ElementTree.parse(folder / "out/labels/a.xml").getroot()
written = [
    [int(x.findtext(f"bndbox/{key}")) for key in EDGES]
    for x in root.iter("object")
]
change = np.array(written) - boxes
counts = dict(zip(EDGES, (change != 0).sum(axis=0).tolist()))
print(f"edges that changed, of {COUNT} boxes:", counts)
print("by pixels:", sorted(set(change[change != 0].tolist())))
share = float((change != 0).any(axis=1).mean())
print(f"boxes that changed: {share:.1%}")
if not share > 0.1 or set(change.ravel().tolist()) != {-1, 0}:
    sys.exit("something else than before")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2>/dev/null
