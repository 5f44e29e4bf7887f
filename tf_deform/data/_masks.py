# SPDX-License-Identifier: Apache-2.0
"""Reads folders of images and of masks of class ids."""

from __future__ import annotations

import collections
import csv
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform._squares import VOID
from tf_deform.data._coco import read_json
from tf_deform.data._drafts import (
    ANIMATED,
    GREY,
    STORED,
    TURNED,
    Draft,
    Notes,
    check_size,
    collect,
    finish,
)
from tf_deform.data._folders import (
    IMAGES,
    ending,
    files,
    folder,
    lines,
    place,
    read_names,
    read_text,
    shown,
    whole,
)
from tf_deform.data._images import (
    header,
    mask_header,
    packed,
    palette,
    read_mask,
)
from tf_deform.data._records import Annotations, Mask

# What Cityscapes appends to the names of images and of masks of ids.
_CITYSCAPES = ("_leftImg8bit", "_gtFine_labelIds")
# Files of one name in a line. Beside the folder of masks, only the first is
# sure to be of masks.
_NAMES = ("class_names.txt", "classes.txt", "classification.txt", "labels.txt")
# What lists of classes call pixels of no class.
_VOID_NAMES = frozenset(
    "boundary border ignore ignored unknown unlabeled unlabelled void".split()
)


def voc_colours() -> dict[int, tuple[int, int, int]]:
    """Returns the colour of each id in Pascal VOC's masks; 255 is void.

    The bits of the id, from the lowest, are spread over the highest bits of
    red, green and blue in turn.
    """
    result = {}
    for index in range(256):
        colour = [0, 0, 0]
        for bit in range(8):
            colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        result[index] = tuple(colour)
    return result


def _table(colours: Any) -> dict[int, int]:
    """Returns the id of each packed colour.

    Args:
        colours: "voc", or a mapping of ids to a colour `(r, g, b)` or a grey
            value.

    Raises:
        ValueError: It is something else, or a colour is there twice.
    """
    if colours == "voc":
        colours = voc_colours()
    table = {}
    try:
        for key, colour in colours.items():
            grey = isinstance(colour, (int, np.integer))
            rgb = [colour] * 3 if grey else [whole(c, "colour") for c in colour]
            if len(rgb) != 3 or not all(0 <= c <= 255 for c in rgb):
                raise ValueError(f"Received colour: {colour}")
            value = int(packed(np.array(rgb)))
            if value in table:
                raise ValueError(f"Received colour {colour} twice")
            table[value] = whole(key, "id")
            if not 0 <= table[value] <= VOID:
                raise ValueError(f"Received id: {key}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "Expected `colours` to be 'voc' or a dict of ids from 0 to 255 and "
            "different colours, (r, g, b) or grey from 0 to 255. Received: "
            f"{colours!r:.200}. {error}"
        ) from error
    return table


@dataclasses.dataclass
class _Told:
    """What a file beside the masks tells of the classes."""

    path: str
    names: dict[int, str]
    colours: dict[int, tuple[int, ...] | int] | None = None
    # Whether the colours are those of gray masks, too.
    gray: bool = False


def _labelmap(path: str) -> _Told:
    """Reads `name:r,g,b:parts:actions` as CVAT and datumaro write it."""
    rows = [line.split(":") for line in lines(read_text(path))]
    names = {i: row[0].strip() for i, row in enumerate(rows)}
    colours = {}
    for i, row in enumerate(rows):
        rgb = row[1].split(",") if len(row) > 1 else []
        if len(rgb) == 3:
            colours[i] = tuple(whole(c.strip(), "colour") for c in rgb)
    return _Told(path, names, colours if len(colours) == len(names) else None)


def _colour_list(path: str) -> _Told | None:
    """Reads `r g b name`, as CamVid's label_colors.txt has it."""
    rows = [
        re.fullmatch(r"(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)", line)
        for line in lines(read_text(path))
    ]
    if not rows or not all(rows):
        return None
    return _Told(
        path,
        {i: row[4] for i, row in enumerate(rows)},
        {i: tuple(map(int, row.groups()[:3])) for i, row in enumerate(rows)},
    )


def _name_list(path: str) -> _Told:
    """Reads one name in a line; labelme's first is void, without an id."""
    names = [name for name in read_names(path) if name != "__ignore__"]
    return _Told(path, dict(enumerate(names)))


def _name_json(path: str) -> _Told | None:
    """Reads an object of names by id, as labelformat writes it."""
    data = read_json(path)
    if (
        not isinstance(data, dict)
        or not data
        or not all(key.isdecimal() for key in data)
        or not all(isinstance(value, str) for value in data.values())
    ):
        return None
    return _Told(path, {int(key): name for key, name in data.items()})


def _name_csv(path: str) -> _Told | None:
    """Reads rows of a name and an id or a colour, in any order of columns."""
    try:
        rows = list(csv.reader(lines(read_text(path))))
    except csv.Error:  # A field is longer than any name.
        return None
    found = []
    for row in rows:
        texts, numbers = [], []
        for field in row:
            words = field.split()
            if words and all(word.isdecimal() for word in words):
                numbers += map(int, words)
            elif words:
                texts.append(field.strip())
        if not found and not numbers:
            continue  # It is the row of titles.
        if len(texts) != 1 or len(numbers) not in (1, 3):
            return None
        if ending(texts[0]) in IMAGES:
            return None  # It tells the classes of images.
        found.append((texts[0], numbers))
    if {len(numbers) for _, numbers in found} == {1}:
        return _Told(path, {numbers[0]: name for name, numbers in found})
    names = {i: name for i, (name, _) in enumerate(found)}
    colours = {i: tuple(numbers) for i, (_, numbers) in enumerate(found)}
    return _Told(path, names, colours)


def _without_void(told: _Told) -> _Told:
    """Gives an id to a class whose pixels are 255, which would be void."""
    name = told.names.get(VOID)
    void = name is None or name.strip("_ ").lower() in _VOID_NAMES
    if void or told.colours:
        return told
    values = sorted(told.names)
    return _Told(
        told.path,
        {i: told.names[value] for i, value in enumerate(values)},
        dict(enumerate(values)),
        gray=True,
    )


def _find_told(labels: str, *beside: str) -> _Told | None:
    """Returns what the first file says that tells names of classes."""
    for where in dict.fromkeys((labels, *beside)):
        for name in sorted(os.listdir(where)):
            path = os.path.join(where, name)
            told = None
            if name == "labelmap.txt":
                told = _labelmap(path)
            elif name == "label_colors.txt":
                told = _colour_list(path)
            elif name in (_NAMES if where == labels else _NAMES[:1]):
                told = _name_list(path)
            elif name.startswith("."):
                continue
            elif name.endswith(".json") and os.path.getsize(path) < 1 << 20:
                told = _name_json(path)
            elif name.endswith(".csv") and "class" in name:
                told = _name_csv(path)
            if told is not None and told.names:
                return _without_void(told)
    return None


class _Side:
    """The files of one side by what their names have in common.

    `photos/*_image.png` chooses the files of a folder with this ending.
    """

    def __init__(self, path: str) -> None:
        where, pattern = os.path.split(os.path.expanduser(path))
        if "*" not in pattern:
            where, pattern = path, "*"
        self.pattern = pattern
        self.root = folder(where or ".")
        before, _, after = pattern.partition("*")
        if "*" in after:
            raise ValueError(
                f"Expected one * in {shown(path)}. Received: {pattern!r}"
            )
        self.found = {}
        for name in files(self.root, IMAGES):
            last = os.path.basename(name)
            if not (last.startswith(before) and last.endswith(after)):
                continue
            core = last[len(before) : len(last) - len(after)]
            key = place(name)
            if pattern != "*":
                key = os.path.join(os.path.dirname(key), core)
            self.found.setdefault(key, []).append(name)
        if not self.found:
            raise FileNotFoundError(
                f"Expected images in {shown(path)}. Received: none"
            )

    def path(self, key: str) -> str:
        """Returns the only file of a key.

        Raises:
            ValueError: There are more.
        """
        names = self.found[key]
        if len(names) > 1:
            raise ValueError(
                "Expected one file of this name. Received: "
                + ", ".join(map(shown, names))
            )
        return os.path.join(self.root, names[0])


def _endings(
    images: Sequence[str], labels: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Returns the mask of each image for each ending of masks.

    An image `a` has the masks `a_mask` and `a_colour` with the endings `_mask`
    and `_colour`.
    """
    result: dict[str, dict[str, str]] = collections.defaultdict(dict)
    keys = {key: key for key in images}
    suffix = _CITYSCAPES[0]
    for key in images:
        if key.endswith(suffix):
            keys[key[: -len(suffix)]] = key
    for label in labels:
        for match in reversed(list(re.finditer(r"[ _.-]|$", label))):
            image = keys.get(label[: match.start()])
            if image is not None:
                result[label[match.start() :]][image] = label
                break
    return result


def _pairs(images: _Side, labels: _Side, notes: Notes) -> dict[str, str]:
    """Returns the key of the mask of each image that has one.

    Raises:
        ValueError: No mask is named as an image, or several are.
    """
    exact = {key: key for key in images.found if key in labels.found}
    if exact:
        return exact
    found = _endings(list(images.found), list(labels.found))
    if len(found) > 1 and _CITYSCAPES[1] in found:
        found = {_CITYSCAPES[1]: found[_CITYSCAPES[1]]}
    if len(found) != 1:
        received = ", ".join(map(repr, sorted(found))) or "none"
        raise ValueError(
            f"Expected in {shown(labels.root)} a mask of the name of each "
            f"image in {shown(images.root)}, as "
            f"{shown(next(iter(images.found)))}.png, or masks with one ending "
            f"more. Received endings: {received}. A pattern chooses one, as in "
            "masks:images/*.jpg,masks/*_ids.png"
        )
    ((suffix, result),) = found.items()
    notes.say(f"masks are the files whose names end with {suffix}")
    return result


@dataclasses.dataclass
class _Kind:
    """Which masks are read by colours, and by which ones."""

    given: dict[int, int] | None
    told: dict[int, int] | None
    gray: bool = False  # Whether gray masks are told as well.

    def mask(self, path: str, mode: str) -> Mask:
        table = self.given
        if table is None and (
            mode in ("RGB", "RGBA") or (self.gray and mode == "L")
        ):
            table = self.told
        return Mask(path, table, colours=table is not None)


def _read(
    image: str, path: str, kind: _Kind, decode: bool
) -> tuple[Draft, np.ndarray, dict[int, tuple[int, ...]]]:
    """Reads a photograph and its mask.

    Returns:
        The photograph, how often each id is in its mask, and the colours of
        the ids if they are those of a palette.
    """
    head = header(image, decode=decode)
    size, mode = mask_header(path)
    stored = check_size(head, size, image)
    mask = kind.mask(path, mode)
    if stored:
        mask = dataclasses.replace(mask, orientation=head.orientation)
    one = Draft(image, head.size, mask=mask)
    if head.orientation > 1:
        one.odd[STORED if stored else TURNED] += 1
    one.odd[ANIMATED] = int(head.animated)
    one.odd[GREY] = int(head.grey)
    count = np.bincount(read_mask(mask).ravel(), minlength=VOID + 1)
    colours = {}
    if mode == "P" and not mask.colours:
        table = palette(path)
        used = np.flatnonzero(count[: len(table)])
        colours = {i: tuple(table[i].tolist()) for i in used.tolist()}
    return one, count, colours


def _check_palettes(
    results: Sequence[tuple[Draft, np.ndarray, dict[int, tuple[int, ...]]]],
) -> None:
    """Checks that an id has one colour in all masks with a palette.

    Raises:
        ValueError: It has two. Then a program chose the palette of each file by
            its colours, and the ids of one file are not those of another.
    """
    seen: dict[int, tuple[tuple[int, ...], str]] = {}
    for one, _, colours in results:
        for key, colour in colours.items():
            first, path = seen.setdefault(key, (colour, one.mask.path))
            if first != colour:
                raise ValueError(
                    "Expected palettes that give an id the same colour in all "
                    f"masks. Received: id {key} of {first} in {shown(path)} "
                    f"and of {colour} in {shown(one.mask.path)}. Each file has "
                    "ids of its own; `colours` reads the colours instead"
                )


def _names(
    counts: np.ndarray,
    told: _Told | None,
    classes: Sequence[str] | None,
    notes: Notes,
) -> dict[int, str]:
    """Returns the name of each id.

    Args:
        counts: How often each id is there.
        told: What a file tells.
        classes: Names in the order of the ids, if no file tells names.
        notes: Learns where the names come from.
    """
    if told is not None:
        notes.say(f"names of the classes are those of {shown(told.path)}")
        return {i: n for i, n in sorted(told.names.items()) if i != VOID}
    if classes is not None:
        return dict(enumerate(classes))
    largest = (
        int(np.flatnonzero(counts[:VOID])[-1]) if counts[:VOID].any() else 0
    )
    notes.say(
        "no file tells names of the classes: they are named by their ids, 0 to "
        f"{largest}"
    )
    return {i: str(i) for i in range(largest + 1)}


def _relabel(drafts: Sequence[Draft], labels: Mapping[int, int]) -> list[Draft]:
    """Gives masks labels instead of the file's ids."""
    ids = {**labels, VOID: VOID}
    tables: dict[int, dict[int, int]] = {}
    for one in drafts:
        old = one.mask.labels
        if id(old) not in tables:
            pairs = labels.items() if old is None else old.items()
            tables[id(old)] = {
                value: ids[label] if old is not None else label
                for value, label in pairs
                if old is None or label in ids
            }
        one.mask = dataclasses.replace(one.mask, labels=tables[id(old)])
    return list(drafts)


def read_masks(
    images: str,
    labels: str,
    *,
    classes: list[str] | None,
    colours: str | Mapping[int, Any] | None,
    skip_broken: bool,
) -> Annotations:
    """Reads masks; see `tf_deform.data.read`."""
    notes = Notes()
    sides = _Side(images), _Side(labels)
    above = [os.path.dirname(os.path.abspath(side.root)) for side in sides]
    told = _find_told(sides[1].root, above[1], above[0])
    kind = _Kind(
        None if colours is None else _table(colours),
        _table(told.colours) if told and told.colours else None,
        bool(told and told.gray),
    )
    same = os.path.samefile(sides[0].root, sides[1].root)
    if same and sides[0].pattern == sides[1].pattern:
        raise ValueError(
            "Expected images and masks in two folders, or patterns that choose "
            "files of one, as masks:x/*.jpg,x/*_mask.png. Received twice: "
            f"{shown(labels)}"
        )
    pairs = _pairs(*sides, notes)

    def reading(image: str, label: str) -> Callable[[], tuple[Any, ...]]:
        return lambda: _read(
            sides[0].path(image), sides[1].path(label), kind, skip_broken
        )

    results = collect(
        [
            (os.path.join(sides[0].root, image), reading(image, label))
            for image, label in pairs.items()
        ],
        skip_broken,
        notes,
    )
    for key in sorted(sides[0].found.keys() - pairs.keys()):
        notes.add("images without a mask were left out", key)
    if pairs.keys() == set(pairs.values()):
        for key in sorted(sides[1].found.keys() - set(pairs.values())):
            notes.add("masks without an image were left out", key)
    _check_palettes(results)
    counts = sum((x[1] for x in results), np.zeros(VOID + 1, np.int64))
    coloured = any(one.mask.colours for one, *_ in results)
    if not coloured and counts[VOID] and not counts[1:VOID].any():
        raise ValueError(
            f"Expected masks of ids in {shown(sides[1].root)}. Received: masks "
            f"of 0 and {VOID} alone, and {VOID} is the void id. "
            f"colours={{0: 0, 1: {VOID}}} takes {VOID} as class 1"
        )
    names = _names(counts, told, classes, notes)
    used = np.flatnonzero(counts[:VOID]).tolist()
    for key in used:
        if key not in names:
            first = next(one.path for one, count, _ in results if count[key])
            raise ValueError(
                f"Expected ids of the {len(names)} classes "
                + ", ".join(f"{i}: {name}" for i, name in names.items())
                + f". Received: id {key}, first in the mask of {shown(first)}"
            )
    order = list(dict.fromkeys(names.values()))
    drafts = _relabel(
        [one for one, *_ in results],
        {key: order.index(names[key]) for key in used},
    )
    _say_shares(counts, names, notes)
    wanted = classes if told is not None else None
    return finish(drafts, {name: name for name in order}, wanted, "", notes)


def _say_shares(
    counts: np.ndarray, names: Mapping[int, str], notes: Notes
) -> None:
    total = max(int(counts.sum()), 1)
    shares = [
        f"{name} {100 * counts[key] / total:.2f} %"
        for key, name in {**names, VOID: "void"}.items()
        if counts[key]
    ]
    notes.say(f"pixels: {', '.join(shares)}")
    unused = [name for key, name in names.items() if not counts[key]]
    if unused:
        notes.say(f"classes without a pixel: {', '.join(unused)}")
