# SPDX-License-Identifier: Apache-2.0
"""Photographs with their objects, as every form of annotations is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform._squares import VOID


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask in a file, and the labels that its pixels are.

    Args:
        path: The file.
        labels: The label of each id of the file, or of each colour as the
            integer `red << 16 | green << 8 | blue`. None: ids are labels.
        colours: Whether the pixels are colours.
        orientation: EXIF's number, if the mask is to be turned as its
            photograph is; 1 is upright.
    """

    path: str
    labels: Mapping[int, int] | None = None
    colours: bool = False
    orientation: int = 1


def _array(value: Any, dtype: type, *shape: int) -> np.ndarray:
    # The copy cannot be written to, so photographs may be shared.
    result = np.array(value, dtype).reshape(shape)
    result.flags.writeable = False
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph and what is on it.

    Args:
        path: The image file.
        width: Width of the upright image in pixels.
        height: Its height.
        boxes: `(n, 4)`, float32: left, upper, right and lower edge in pixels of
            the upright image. Pixel `i` lies between `i` and `i + 1`. All boxes
            are within the image and have an area.
        labels: `(n,)`, int32: positions in `Annotations.classes`.
        crowd: `(n,)`, bool: groups of objects in one box.
        difficult: `(n,)`, bool: objects that need not be found.
        mask: The classes of its pixels, for `read_mask`, or None.
        areas: `(n,)`, float64: pixels of the objects, by which COCO's measures
            tell small from large; None are the areas of the boxes.
    """

    path: str
    width: int
    height: int
    boxes: np.ndarray = ()
    labels: np.ndarray = ()
    crowd: np.ndarray | None = None
    difficult: np.ndarray | None = None
    mask: Mask | str | None = None
    areas: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        none = np.zeros(count, bool)
        for name, dtype, shape in (
            ("boxes", np.float32, (count, 4)),
            ("labels", np.int32, (count,)),
            ("crowd", np.bool_, (count,)),
            ("difficult", np.bool_, (count,)),
        ):
            value = getattr(self, name)
            value = none if value is None else value
            object.__setattr__(self, name, _array(value, dtype, *shape))
        areas = self.areas
        if areas is None:
            sides = (self.boxes[:, 2:] - self.boxes[:, :2]).astype(np.float64)
            areas = sides.prod(-1)
        object.__setattr__(self, "areas", _array(areas, np.float64, count))


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """Photographs with objects of named classes.

    Args:
        classes: The name of each label.
        photographs: The photographs.
        notes: What the reader found odd and what it did about it, in lines for
            a log.
    """

    classes: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("classes", "photographs", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def select(self, classes: Sequence[str]) -> Annotations:
        """Returns the same objects with the labels of another list of classes.

        Classes are joined by their names. So validation data follows the
        classes of training data, whatever ids its tool gave them.

        Args:
            classes: The name of each new label.

        Raises:
            ValueError: A class that is in use is not in the list, or a name is
                there twice.
        """
        classes = tuple(classes)
        if len(set(classes)) != len(classes):
            raise ValueError(
                f"Expected classes of different names. Received: {classes}"
            )
        places = {name: label for label, name in enumerate(classes)}
        new = [places.get(name, -1) for name in self.classes]
        used = set()
        for photograph in self.photographs:
            used.update(photograph.labels.tolist())
            used.update(_mask_labels(photograph.mask, len(new)))
        lost = [self.classes[i] for i in sorted(used) if new[i] < 0]
        if lost:
            raise ValueError(
                f"Expected objects of {', '.join(classes)} alone. Received: "
                f"objects of {', '.join(lost)}; the data has the classes "
                f"{', '.join(self.classes)}{_advise(lost, classes)}"
            )
        table = np.array([*new, -1], np.int32)
        masks = {}  # One table serves many masks.

        def moved(mask: Mask | str | None) -> Mask | None:
            if mask is None or new == list(range(len(new))):
                return mask
            mask = Mask(mask) if isinstance(mask, str) else mask
            key = id(mask.labels)
            if key not in masks:
                old = mask.labels
                old = {i: i for i in range(len(new))} if old is None else old
                masks[key] = {
                    value: label if label == VOID else new[label]
                    for value, label in old.items()
                    if label == VOID or new[label] >= 0
                }
            return dataclasses.replace(mask, labels=masks[key])

        photographs = tuple(
            dataclasses.replace(
                photograph,
                labels=table[photograph.labels],
                mask=moved(photograph.mask),
            )
            for photograph in self.photographs
        )
        return dataclasses.replace(
            self, classes=classes, photographs=photographs
        )

    def split(
        self, share: float, seed: int = 0
    ) -> tuple[Annotations, Annotations]:
        """Returns two parts, of training and of validation, drawn by chance.

        Args:
            share: The share of photographs of the second part, in (0, 1). Both
                parts have at least one photograph.
            seed: The same seed gives the same parts of the same photographs.

        Raises:
            ValueError: The share is none, or there are less than two
                photographs.
        """
        count = len(self.photographs)
        if not 0 < share < 1:
            raise ValueError(
                f"Expected `share` to be between 0 and 1. Received: {share}"
            )
        if count < 2:
            raise ValueError(
                f"Expected at least two photographs to split. Received: {count}"
            )
        second = min(max(round(share * count), 1), count - 1)
        drawn = set(np.random.default_rng(seed).permutation(count)[:second])
        return tuple(
            self._part([i for i in range(count) if (i in drawn) == chosen])
            for chosen in (False, True)
        )

    def _part(self, places: list[int]) -> Annotations:
        photographs = [self.photographs[i] for i in places]
        used = {i for p in photographs for i in p.labels.tolist()}
        before = {i for p in self.photographs for i in p.labels.tolist()}
        notes = [
            f"classes without an object in this part: {self.classes[i]}"
            for i in sorted(before - used)
        ]
        return Annotations(self.classes, photographs, (*self.notes, *notes))

    def to_coco(self) -> dict[str, Any]:
        """Returns the objects as COCO's json has them, for an evaluation.

        Images, annotations and categories are numbered from 1 in the order of
        the photographs, objects and classes, as evaluations take an annotation
        0 for none. `area` is that of the object's outline where
        the file tells one, else of the box. Crowds and difficult objects have
        `iscrowd` 1: an evaluation ignores no other.
        """
        images, annotations = [], []
        for photograph in self.photographs:
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": photograph.path,
                    "width": photograph.width,
                    "height": photograph.height,
                }
            )
            ignored = photograph.crowd | photograph.difficult
            for box, label, crowd, area in zip(
                photograph.boxes.astype(np.float64).tolist(),
                photograph.labels.tolist(),
                ignored.tolist(),
                photograph.areas.tolist(),
            ):
                left, top, right, bottom = box
                width, height = right - left, bottom - top
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": label + 1,
                        "bbox": [left, top, width, height],
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": label + 1, "name": name}
                for label, name in enumerate(self.classes)
            ],
        }


def _mask_labels(mask: Mask | str | None, count: int) -> set[int]:
    """Returns the labels that a mask may hold."""
    if mask is None:
        return set()
    if isinstance(mask, str) or mask.labels is None:
        return set(range(count))
    return set(mask.labels.values()) - {VOID}


def _advise(lost: Sequence[str], classes: Sequence[str]) -> str:
    """Says what names that are not among the classes may be meant for."""
    if all(name.isdecimal() for name in lost):
        return (
            ". Where files hold ids alone, `classes` (--classes) names them, "
            f"in their order: {','.join(classes)}"
        )
    folded = {name.casefold(): name for name in classes}
    alike = [name for name in lost if name.casefold() in folded]
    return "".join(
        f". Letters count: {name} is not {folded[name.casefold()]}"
        for name in alike
    )
