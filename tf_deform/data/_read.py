# SPDX-License-Identifier: Apache-2.0
"""Reads annotations in the forms that labelling tools write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tf_deform.data._coco import read_coco
from tf_deform.data._images import pillow
from tf_deform.data._masks import read_masks
from tf_deform.data._records import Annotations
from tf_deform.data._voc import read_voc
from tf_deform.data._yolo import read_yolo

_FORMS = (
    "voc:ROOT[:PART], coco:FILE[,IMAGES], masks:IMAGES,LABELS, yolo:ROOT[:PART]"
)


def _halves(text: str, mark: str) -> tuple[str, str | None]:
    """Splits at a mark that is not within the path of the first half."""
    parts = text.split(mark)
    for count in range(len(parts), 0, -1):
        first = mark.join(parts[:count])
        if os.path.exists(os.path.expanduser(first)):
            return first, mark.join(parts[count:]) or None
    first, _, second = text.partition(mark)
    return first, second or None


def read(
    source: str,
    *,
    classes: Sequence[str] | None = None,
    base: int = 0,
    first_id: int | None = None,
    crowds: str = "ignore",
    colours: str | Mapping[int, Any] | None = None,
    skip_broken: bool = False,
) -> Annotations:
    """Reads photographs and their annotations.

        annotations = tf_deform.data.read("voc:photos")
        print(*annotations.notes, sep="\\n")

    The forms, as labelling tools write them:

    - `voc:ROOT[:PART]`: Pascal VOC's xml files, beside the images or in
      folders of their own; a part is `ImageSets/Main/PART.txt` or a folder.
    - `coco:FILE[,IMAGES]`: COCO's json; boxes come from `bbox`. Images are
      looked for beside the file, or beside its folder `annotations`, if no
      folder is named.
    - `yolo:ROOT[:PART]`: text files beside the images or in `labels`, with a
      data.yaml, classes.txt or obj.names; lines of points give the box around
      them. A part is one of data.yaml or a folder.
    - `masks:IMAGES,LABELS`: a mask of class ids for each image, of the same
      name or with one ending more; `masks:a/*.jpg,b/*_ids.png` chooses.

    Images are found by the path that a file gives, else by its tail, else by
    the last name, if that is unique. Sizes are those of the images, upright
    after EXIF. Boxes refer to the upright image, unless the file claims the
    size of the image as it is stored. They are clipped to the image; those
    without an area are dropped. Images without objects are kept. `notes` of the
    result say what was odd and what was done about it.

    Args:
        source: One of the forms.
        classes: Names of the classes in the order of their labels. Objects are
            joined by name where the files tell names; else, for YOLO and masks,
            these are the names of the ids.
        base: 1 for VOC files that count pixels from 1 with both ends inside.
        first_id: The first id of YOLO's list of names, 0 by default.
        crowds: "ignore", or "objects" to take crowds as objects.
        colours: The colours of masks: "voc", or a dict of ids and colours
            `(r, g, b)` or grey values.
        skip_broken: Whether to leave out photographs that are broken, whose
            pixels are decoded to find out, and name them in the notes.

    Raises:
        ModuleNotFoundError: Pillow is not installed, or PyYAML for a data.yaml.
        OSError: A folder or file of the source is not there.
        ValueError: The files are broken or contradict themselves; the message
            names them.
    """
    form, mark, rest = source.partition(":")
    if not mark or not rest or form not in ("voc", "coco", "masks", "yolo"):
        raise ValueError(f"Expected one of {_FORMS}. Received: {source!r:.200}")
    for name, value, owner in (
        ("base", base, "voc"),
        ("first_id", first_id, "yolo"),
        ("colours", colours, "masks"),
    ):
        if value and form != owner:
            raise ValueError(
                f"Expected `{name}` with {owner} alone. Received: "
                f"{value!r:.80} with {form}"
            )
    if base not in (0, 1) or crowds not in ("ignore", "objects"):
        raise ValueError(
            "Expected `base` to be 0 or 1 and `crowds` 'ignore' or 'objects'. "
            f"Received: {base!r}, {crowds!r}"
        )
    pillow()
    options: dict[str, Any] = {
        "classes": None if classes is None else list(classes),
        "skip_broken": skip_broken,
    }
    if form == "masks":
        images, labels = _halves_of_patterns(rest)
        return read_masks(images, labels, colours=colours, **options)
    options["crowds"] = crowds
    if form == "coco":
        return read_coco(*_halves(rest, ","), **options)
    first, part = _halves(rest, ":")
    if form == "voc":
        return read_voc(first, part, base=base, **options)
    return read_yolo(first, part, first_id=first_id, **options)


def _halves_of_patterns(text: str) -> tuple[str, str]:
    """Splits at the comma where both halves, or their folders, are there."""
    parts = text.split(",")
    halves = [
        (",".join(parts[:i]), ",".join(parts[i:])) for i in range(1, len(parts))
    ]
    if not halves:
        raise ValueError(
            f"Expected masks:IMAGES,LABELS. Received: masks:{text:.200}"
        )

    def there(path: str) -> bool:
        where, last = os.path.split(os.path.expanduser(path))
        return os.path.isdir(
            where if "*" in last else os.path.join(where, last)
        )

    return next((h for h in halves if there(h[0]) and there(h[1])), halves[0])
