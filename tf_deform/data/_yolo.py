# SPDX-License-Identifier: Apache-2.0
"""Reads folders of images with YOLO's text files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from tf_deform.data._coco import read_json
from tf_deform.data._drafts import (
    FOREIGN,
    Draft,
    Notes,
    Told,
    collect,
    draft,
    finish,
)
from tf_deform.data._folders import (
    Index,
    files,
    folder,
    lines,
    number,
    pair,
    read_names,
    read_text,
    shown,
    whole,
)
from tf_deform.data._images import header
from tf_deform.data._records import Annotations

_YAML = (".yaml", ".yml")
# Files of names, one in a line.
_NAMES = ("classes.txt", "classification.txt", "labels.txt", "names.txt")
_NO_PATHS = ("", "~", "null", "Null", "NULL")  # As yaml writes nothing.
_PARTS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# Shares of a width or height from this on are no rounding: they are pixels, or
# a pose's 2 for a point that is seen.
_LARGEST = 2.0


def _load_yaml(path: str) -> dict[str, Any]:
    """Returns a yaml file whose keys and values are all text.

    Raises:
        ModuleNotFoundError: PyYAML is not installed.
        ValueError: The file is no yaml; the message names it.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Expected PyYAML to be installed, for {shown(path)}. Received: "
            f"{error}. Run `pip install 'tf-deform[train]'`"
        ) from error
    try:
        # This loader makes no objects, and leaves a class named "no" as it is.
        data = yaml.load(read_text(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"Expected {shown(path)} to be yaml. Received: {error}"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"Expected {shown(path)} to hold keys and values. Received: "
            f"{type(data).__name__}"
        )
    return data


def _yaml_names(data: dict[str, Any], path: str) -> dict[int, str] | list[str]:
    """Returns the names of a yaml file: by id, or as a list."""
    names = data.get("names") or []
    values = list(names.values()) if isinstance(names, dict) else names
    if isinstance(values, list) and all(
        isinstance(value, str) and value.strip() for value in values
    ):
        if isinstance(names, dict):
            return {
                whole(key, f"a key of names in {shown(path)}"): name.strip()
                for key, name in names.items()
            }
        return [name.strip() for name in names]
    raise ValueError(
        f"Expected `names` of {shown(path)} to be a list of names, or names by "
        f"id. Received: {names!r:.200}"
    )


def _data_file(path: str) -> dict[str, Any]:
    """Returns the keys and values of darknet's obj.data."""
    pairs = (line.split("=", 1) for line in lines(read_text(path)))
    return {key[0].strip(): key[-1].strip() for key in pairs}


class _Reader:
    """What the files of a YOLO folder say besides the labels."""

    def __init__(self, root: str, notes: Notes) -> None:
        root = os.path.expanduser(root)
        chosen = None
        if os.path.isfile(root) and root.lower().endswith(_YAML):
            chosen, root = root, os.path.dirname(root) or "."
        self.root = folder(root)
        self.notes = notes
        self.settings: dict[str, Any] = {}
        # Names as each file tells them.
        self.told: dict[str, dict[int, str] | list[str]] = {}
        self._read_settings(chosen)
        if not files(self.root, {".txt"}) and self.settings.get("path"):
            # The file lies apart from the data set that it describes.
            path = os.path.join(self.root, self.settings["path"])
            self.root = path if os.path.isdir(path) else self.root
        self.index = Index(self.root)
        self._read_names()
        self.parts = self._parts()

    def _read_settings(self, chosen: str | None) -> None:
        found = [chosen] if chosen else []
        for name in sorted(os.listdir(self.root)):
            path = os.path.join(self.root, name)
            if name.startswith("."):
                continue  # macOS puts a ._data.yaml beside a data.yaml.
            if chosen is None and name.lower().endswith(_YAML):
                found.append(path)
            elif name == "obj.data":
                self.settings.update(_data_file(path))
        if not found:  # The file of a job may lie in the job's folder.
            inner = [
                os.path.join(self.root, x) for x in files(self.root, _YAML)
            ]
            found = inner if len(inner) == 1 else []
        for path in found:
            data = _load_yaml(path)
            if "names" not in data and len(found) > 1:
                continue
            self.settings.update(data)
            if data.get("names"):
                self.told[path] = _yaml_names(data, path)

    def _read_names(self) -> None:
        for name in files(self.root, {".txt", ".names", ".labels"}):
            path = os.path.join(self.root, name)
            if not name.endswith(".txt") or os.path.basename(name) in _NAMES:
                self.told[path] = read_names(path)
        notes = os.path.join(self.root, "notes.json")  # Label Studio's
        if not self.told and os.path.isfile(notes):
            data = read_json(notes)
            found = data.get("categories") if isinstance(data, dict) else None
            if isinstance(found, list) and found:
                self.told[notes] = {
                    whole(x["id"], "id"): str(x["name"])
                    for x in found
                    if isinstance(x, dict) and {"id", "name"} <= x.keys()
                }

    def names(
        self, classes: Sequence[str] | None, first_id: int | None
    ) -> dict[int, str]:
        """Returns the name of each id.

        Raises:
            ValueError: No file tells names, or two tell different ones.
        """
        first = 0 if first_id is None else first_id
        told = {path: names for path, names in self.told.items() if names}
        if not told and classes is not None:
            told = {"classes": list(classes)}
        if not told:
            raise ValueError(
                "Expected a data.yaml, classes.txt or obj.names with the names "
                f"of the classes in {shown(self.root)}, or `classes` in the "
                "order of the ids. Received: none"
            )
        by_id = {
            path: names
            if isinstance(names, dict)
            else dict(enumerate(names, first))
            for path, names in told.items()
        }
        (path, names), *others = by_id.items()
        for other, its in others:
            if its != names:
                raise ValueError(
                    "Expected files that tell the same names. Received: "
                    f"{shown(path)}: {names}, {shown(other)}: {its}. Remove "
                    "the one that is out of date"
                )
        if len(set(names.values())) != len(names):
            raise ValueError(
                f"Expected {shown(path)} to tell different names. Received: "
                f"{names}"
            )
        return dict(sorted(names.items()))

    def _parts(self) -> dict[str, list[str]]:
        """Returns the images of each part that the settings name.

        Paths are those of the machine on which the tool ran.
        """
        result: dict[str, list[str]] = {}
        for key, part in _PARTS.items():
            value = self.settings.get(key)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and path.strip() not in _NO_PATHS:
                    images = self._part(path.strip(), key)
                    result.setdefault(part, []).extend(images)
        return {
            part: list(dict.fromkeys(images))
            for part, images in result.items()
            if images
        }

    def _part(self, path: str, key: str) -> list[str]:
        """Returns the images of a folder or list, found by its path's tail."""
        whole_path = f"{self.settings.get('path') or ''}/{path}"
        parts = whole_path.replace("\\", "/").split("/")
        parts = [part for part in parts if part not in ("", ".", "..")]
        tails = [parts[i:] for i in range(len(parts))] or [[]]
        for tail in tails:
            found = os.path.join(self.root, *tail)
            if os.path.isdir(found):
                start = "".join(part + "/" for part in tail)
                return [x for x in self.index.paths if x.startswith(start)]
            if os.path.isfile(found):
                return [self._listed(x) for x in lines(read_text(found))]
        self.notes.add("parts of the data that are not there", f"{key}: {path}")
        return []

    def _listed(self, line: str) -> str:
        try:
            return self.index.find(line)
        except FileNotFoundError:  # It is broken when it is read.
            return line

    def images(self, split: str | None, labelled: Iterable[str]) -> list[str]:
        """Returns the images of a part, or all.

        Args:
            split: The part, or None.
            labelled: The images that have labels. Images that lie elsewhere are
                of something else.

        Raises:
            ValueError: There is no such part, or no image.
        """
        if split is not None:
            found = self.parts.get(_PARTS.get(split, split)) or [
                path
                for path in self.index.paths
                if split in path.split("/")[:-1]
            ]
            if not found:
                raise ValueError(
                    f"Expected a part or folder of {shown(self.root)} with "
                    f"images, as {', '.join(self.parts) or 'none'}. Received: "
                    f"{split}"
                )
            return found
        if not self.index.paths:
            raise FileNotFoundError(
                f"Expected images in {shown(self.root)}. Received: none"
            )
        if len({frozenset(part) for part in self.parts.values()}) > 1:
            self.notes.say(
                "all parts are read together: "
                + ", ".join(f"{k} {len(v)}" for k, v in self.parts.items())
                + "; yolo:ROOT:PART reads one"
            )
        listed = [image for part in self.parts.values() for image in part]
        what = "images of no part were left out"
        if not listed:
            what = FOREIGN
            places = {os.path.dirname(image) for image in labelled}
            listed = [
                x
                for x in self.index.paths
                if not places
                or os.path.dirname(x) in places
                or x.startswith("images/")
            ]
        for other in sorted({*self.index.paths} - {*listed}):
            self.notes.add(what, other)
        return list(dict.fromkeys(listed))


def _is_label(text: str) -> bool:
    """Checks that a text without an image has the form of labels."""
    first = next(iter(lines(text)), "").split()
    try:
        return len(first) > 4 and all(
            number(value, "") is not None for value in first
        )
    except ValueError:
        return False


def _told(line: str, keypoints: int) -> Told:
    """Returns the object of a line, with a box in shares of the image.

    Args:
        line: `id x y w h` with the centre, or `id x1 y1 x2 y2 ...` with points.
        keypoints: How many numbers follow a box.
    """
    first, *rest = line.split()
    key = whole(first, "the class id")
    values = [number(value, "a coordinate") for value in rest]
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    if len(values) == 4:
        x, y, w, h = values
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[0::2], values[1::2]
        box = (min(xs), min(ys), max(xs), max(ys))
    else:
        raise ValueError(
            "Expected 4 numbers of a box after the class id, or 6 or more of "
            f"points. Received: {len(values)}"
            + (", as with a confidence" if len(values) == 5 else "")
        )
    if max(map(abs, box)) >= _LARGEST:
        raise ValueError(
            "Expected shares of the image's width and height, from 0 to 1, or "
            "a pose, whose `kpt_shape` data.yaml tells. Received: "
            f"{line!r:.80}"
        )
    return Told(key, box)


def _read_labels(path: str, keypoints: int) -> list[Told]:
    told = []
    for count, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                told.append(_told(line, keypoints))
            except ValueError as error:
                raise ValueError(f"line {count}: {error}") from error
    return told


def read_yolo(
    root: str,
    split: str | None = None,
    *,
    classes: list[str] | None,
    first_id: int | None,
    crowds: str,
    skip_broken: bool,
) -> Annotations:
    """Reads YOLO's form; see `tf_deform.data.read`."""
    notes = Notes()
    reader = _Reader(root, notes)
    names = reader.names(classes, first_id)
    shape = reader.settings.get("kpt_shape") or [0]
    keypoints = 1
    for side in shape:
        keypoints *= whole(side, "kpt_shape")
    texts = [
        path
        for path in files(reader.root, {".txt"})
        if os.path.join(reader.root, path) not in reader.told
    ]
    labels: dict[str, list[str]] = {}
    orphans = []
    for label, images in pair(reader.index.paths, texts).items():
        for image in images:
            labels.setdefault(image, []).append(label)
        if not images:
            orphans.append(label)
        elif len(images) > 1:
            notes.add("labels that several images of one name share", label)

    def read(name: str) -> Draft:
        place = reader.index.find(name)
        found = labels.get(place, [])
        if len(found) > 1:
            raise ValueError(
                "Expected one file of labels. Received: "
                + ", ".join(map(shown, found))
            )
        image = os.path.join(reader.root, place)
        head = header(image, decode=skip_broken)
        told = []
        if found:
            path = os.path.join(reader.root, found[0])
            try:
                told = _read_labels(path, keypoints)
            except ValueError as error:
                raise ValueError(f"{shown(path)}, {error}") from error
        width, height = head.size
        scale = (width, height, width, height)
        told = [
            Told(one.key, tuple(a * b for a, b in zip(one.box, scale)))
            for one in told
        ]
        one = draft(image, head, told)
        one.odd["images without a file of labels, taken as empty"] = not found
        return one

    def orphan(path: str) -> None:
        if _is_label(read_text(os.path.join(reader.root, path))):
            raise ValueError("Expected one image of this name. Received: none")

    chosen = reader.images(split, labels)
    items = [
        (os.path.join(reader.root, image), lambda image=image: read(image))
        for image in chosen
    ]
    if split is None:
        items += [
            (os.path.join(reader.root, path), lambda path=path: orphan(path))
            for path in orphans
        ]
    drafts = [one for one in collect(items, skip_broken, notes) if one]
    used = {told.key for one in drafts for told in one.told}
    if first_id is None and 0 in names and used and 0 not in used:
        notes.say(
            f"no object has the id 0, {names[0]}: if ids begin at 1, "
            "first_id=1 reads them"
        )
    first = -1 if -1 in used else 1
    hint = f". first_id={first} reads ids that begin at {first}"
    hint = hint if first_id is None else ""
    return finish(drafts, names, classes, crowds, notes, hint=hint)
