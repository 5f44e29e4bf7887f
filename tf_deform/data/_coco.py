# SPDX-License-Identifier: Apache-2.0
"""Reads COCO's json files."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Hashable, Mapping
from typing import Any

from tf_deform.data._drafts import Draft, Notes, Told, collect, draft, finish
from tf_deform.data._folders import (
    IMAGES,
    Index,
    files,
    flag,
    folder,
    number,
    read_bytes,
    shown,
)
from tf_deform.data._images import header
from tf_deform.data._records import Annotations


def read_json(path: str) -> Any:
    """Returns what a json file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no json; the message names it.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {shown(path)} to be json. Received: {error}"
        ) from error


def _id(value: Any, what: str) -> Hashable:
    """Returns an id, the same for 3, 3.0 and "3".

    Raises:
        ValueError: It is neither a number nor text, or a float that may have
            lost digits.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,4000}", value.strip()):
        return int(value)
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"Expected {what} to be a whole number or text. Received: {value!r:.80}"
    )


def _entries(data: Any, path: str, key: str) -> list[dict[str, Any]]:
    """Returns a list of objects of the file."""
    received = type(data).__name__
    if isinstance(data, dict):
        value = data.get(key)
        if isinstance(value, list) and all(isinstance(x, dict) for x in value):
            return value
        received = "no such key"
        if key in data:
            received = f"{key} of another kind, {value!r:.80}"
    raise ValueError(
        f"Expected {shown(path)} to be COCO's object with a list of objects "
        f"under {key!r}. Received: {received}"
    )


def _names(path: str, categories: list[dict[str, Any]], notes: Notes) -> dict:
    """Returns the names of the category ids, in the order of the ids.

    Raises:
        ValueError: An id is given twice or has no name.
    """
    names: dict[Hashable, str] = {}
    for category in categories:
        key = _id(category.get("id"), f"a category's id in {shown(path)}")
        name = category.get("name")
        name = str(name).strip() if isinstance(name, (str, int, float)) else ""
        if key in names or not name:
            raise ValueError(
                f"Expected the categories of {shown(path)} to have different "
                f"ids and names. Received: category id {key} "
                + (
                    f"twice: {names[key]}, {name}"
                    if key in names
                    else "without a name"
                )
            )
        if name in names.values():
            notes.add("categories share a name and were joined", name)
        names[key] = name
    if all(isinstance(key, int) for key in names):
        names = dict(sorted(names.items()))
    return names


def _bounds(polygons: Any) -> tuple[float, float, float, float] | None:
    """Returns the box around polygons `[[x, y, x, y, ...], ...]`, or one."""
    if not isinstance(polygons, list):
        return None
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]
    polygons = [p for p in polygons if p != []]
    if not all(
        isinstance(p, list) and len(p) >= 4 and len(p) % 2 == 0
        for p in polygons
    ):
        return None
    xs = [number(v, "segmentation") for p in polygons for v in p[0::2]]
    ys = [number(v, "segmentation") for p in polygons for v in p[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)) if xs else None


def _told(annotation: Mapping[str, Any], key: Hashable) -> Told:
    """Returns an object; its box comes from a polygon only if it has none."""
    box = annotation.get("bbox")
    if isinstance(box, (list, tuple)) and len(box) == 4:
        x, y, width, height = (number(value, "bbox") for value in box)
        edges = (x, y, x + width, y + height)
    else:
        edges = None if box else _bounds(annotation.get("segmentation"))
        if edges is None:
            raise ValueError(
                "Expected `bbox` to be a list of x, y, width and height, or "
                f"polygons as `segmentation`. Received: {box!r:.80}"
            )
    extra = annotation.get("attributes")
    extra = extra if isinstance(extra, dict) else {}
    difficult = (
        flag(annotation.get("difficult"), "difficult")
        or flag(annotation.get("ignore"), "ignore")
        or flag(extra.get("difficult"), "difficult")
    )
    crowd = flag(annotation.get("iscrowd"), "iscrowd") or flag(
        extra.get("is_crowd"), "is_crowd"
    )
    rest = {name: v for name, v in annotation.items() if name != "id"}
    area = annotation.get("area")
    outlined = bool(annotation.get("segmentation")) and area is not None
    area = max(number(area, "area"), 0.0) if outlined else None
    return Told(key, edges, crowd, difficult, rest, area)


def _size(image: Mapping[str, Any]) -> tuple[float, float] | None:
    sides = (image.get("width"), image.get("height"))
    if not all(sides):
        return None
    return tuple(number(side, "width and height") for side in sides)


def _join(
    path: str,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    names: Mapping[Hashable, str],
    notes: Notes,
) -> dict[Hashable, list[dict[str, Any]]]:
    """Returns the annotations of each image id.

    Raises:
        ValueError: An image id is given twice, or a category id has no name.
    """
    result: dict[Hashable, list[dict[str, Any]]] = {}
    by_id = {}
    for image in images:
        key = _id(image.get("id"), f"an image's id in {shown(path)}")
        if key in result:
            raise ValueError(
                f"Expected the images of {shown(path)} to have different ids. "
                f"Received: image id {key} twice: {by_id[key]}, "
                f"{image.get('file_name')}"
            )
        result[key] = []
        by_id[key] = image.get("file_name")
    unknown = collections.Counter()
    for annotation in annotations:
        if "segments_info" in annotation:
            raise ValueError(
                f"Expected the annotations of {shown(path)} to be objects with "
                "a category_id and a bbox. Received: segments_info, COCO's "
                "panoptic form. Export instances"
            )
        key = _id(annotation.get("image_id"), f"an image_id in {shown(path)}")
        category = _id(
            annotation.get("category_id"), f"a category_id in {shown(path)}"
        )
        if category not in names:
            unknown[category] += 1
        if key in result:
            result[key].append(annotation)
        else:
            notes.add(
                "annotations of images that the file does not list were "
                "dropped",
                f"image id {key}",
            )
    if unknown:
        text = ", ".join(
            f"{shown(str(key))} ({n} times)" for key, n in unknown.items()
        )
        listed = ", ".join(map(str, names)) or "of which it lists none"
        raise ValueError(
            f"Expected the annotations of {shown(path)} to have ids of its "
            f"categories, {listed}. Received: category_id {text}"
        )
    if annotations and not any(result.values()):
        raise ValueError(
            f"Expected the annotations of {shown(path)} to have image ids of "
            f"its images, as {next(iter(result), 'none')}. Received: "
            f"{annotations[0]['image_id']!r:.80}"
        )
    return result


def read_coco(
    path: str,
    images: str | None = None,
    *,
    classes: list[str] | None,
    crowds: str,
    skip_broken: bool,
) -> Annotations:
    """Reads COCO's json; see `tf_deform.data.read`."""
    path = os.path.expanduser(path)
    data = read_json(path)
    beside = os.path.dirname(path) or "."
    full = os.path.abspath(beside)
    if os.path.basename(full) == "annotations" and not files(full, IMAGES):
        beside = os.path.dirname(full)  # COCO's layout: images lie beside.
    index = Index(folder(images or beside))
    notes = Notes()
    listed_images = set()
    names = _names(path, _entries(data, path, "categories"), notes)
    listed = _entries(data, path, "images")
    if not listed:
        raise ValueError(
            f"Expected {shown(path)} to list images. Received: none"
        )
    objects = _join(
        path, listed, _entries(data, path, "annotations"), names, notes
    )

    def read(image: dict[str, Any]) -> Draft:
        name = image.get("file_name")
        if not name or not isinstance(name, str):
            raise ValueError(f"Expected a file_name. Received: {name!r:.80}")
        place = index.find(name)
        found = os.path.join(index.root, place)
        listed_images.add(place)
        told = [
            _told(annotation, _id(annotation["category_id"], "category_id"))
            for annotation in objects[_id(image["id"], "id")]
        ]
        return draft(
            found, header(found, decode=skip_broken), told, _size(image)
        )

    items = [
        (
            f"{path}, image {image.get('file_name') or image.get('id')}",
            lambda image=image: read(image),
        )
        for image in listed
    ]
    drafts = collect(items, skip_broken, notes)
    for other in index.paths:
        if other not in listed_images:
            notes.add("images that the file does not list were left out", other)
    if not names:
        raise ValueError(
            f"Expected {shown(path)} to have categories. Received: none"
        )
    return finish(drafts, names, classes, crowds, notes)
