# SPDX-License-Identifier: Apache-2.0
"""Finds files in folders, and reads text and numbers of any tool."""

from __future__ import annotations

import codecs
import collections
import math
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

IMAGES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .mpo .pgm .png .pnm .ppm .tif .tiff .webp"
    "".split()
)
# Folders that say what lies in them and so are no part of an image's place.
_KINDS = frozenset("annotations images jpegimages labels xml xmls".split())


def shown(path: str) -> str:
    """Returns a path as text that any log can write."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # A json file may hold half of a character.
        data = path.encode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def stem(path: str) -> str:
    """Returns a file's name up to its last dot."""
    return os.path.splitext(os.path.basename(path))[0]


def _raise(error: OSError) -> None:
    raise error


def files(root: str, endings: Iterable[str]) -> list[str]:
    """Returns the files below a folder, as sorted paths from it.

    Names that begin with a dot, and what macOS packs beside files, are left
    out. Links are followed, each folder once. A folder with such an ending is
    named as well: whoever opens it learns that it is none.

    Args:
        root: A folder.
        endings: Endings of names in lower case, with the dot.

    Raises:
        OSError: A folder cannot be read.
    """
    found = []
    seen = set()
    for folder, folders, names in os.walk(
        root, onerror=_raise, followlinks=True
    ):
        status = os.stat(folder)
        place = (status.st_dev, status.st_ino)
        entries = [] if place in seen else [*names, *folders]
        seen.add(place)
        entries = [
            name
            for name in entries
            if not name.startswith(".") and name != "__MACOSX"
        ]
        wanted = [name for name in entries if ending(name) in endings]
        folders[:] = sorted({*folders} & {*entries} - {*wanted})
        inner = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inner, n)) for n in wanted]
    return sorted(found)


def folder(path: str) -> str:
    """Returns the path of a folder that is there.

    Raises:
        FileNotFoundError: It is not.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"Expected a folder. Received: {shown(path)!r}, which is "
            f"{_kind(path)}"
        )
    return path


def inner(root: str, *names: str) -> str | None:
    """Returns the folder in `root` with one of the names, in any case."""
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
        if name.lower() in names and os.path.isdir(path):
            return path
    return None


def _kind(path: str) -> str:
    if os.path.isdir(path):
        return "a folder"
    if os.path.isfile(path):
        return "a file"
    if os.path.islink(path) and not os.path.exists(path):
        return "a link to nothing"
    return "no file" if os.path.exists(path) else "not there"


def check_file(path: str) -> None:
    """Checks that a path is a regular file: opening a pipe would wait.

    Raises:
        FileNotFoundError: It is not.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Expected a file. Received: {shown(path)!r}, which is "
            f"{_kind(path)}"
        )


def read_bytes(path: str) -> bytes:
    check_file(path)
    with open(path, "rb") as file:
        return file.read()


def read_text(path: str) -> str:
    """Returns the text of a file in UTF-8, or UTF-16 with its mark.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such text.
    """
    data = read_bytes(path)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {shown(path)} to be text in UTF-8. Received: {error}"
        ) from error


def number(value: Any, what: str) -> float:
    """Returns a number that a file gives as one or as text.

    Raises:
        ValueError: It is none, or not finite.
    """
    result = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            # Python would read "1_0" as 10.
            result = math.nan if "_" in str(value) else float(value)
        except (ValueError, OverflowError):
            pass
    if not math.isfinite(result):
        raise ValueError(
            f"Expected {what} to be a finite number. Received: {value!r:.80}"
        )
    return result


def whole(value: Any, what: str) -> int:
    """Returns an integer that a file may give as "3" or 3.0.

    Raises:
        ValueError: It is none.
    """
    result = number(value, what)
    if result != int(result):
        raise ValueError(
            f"Expected {what} to be an integer. Received: {value!r:.80}"
        )
    return int(value) if isinstance(value, int) else int(result)


def flag(value: Any, what: str) -> bool:
    """Returns a truth value that a file gives as a number, a word or nothing.

    Raises:
        ValueError: It is none.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str):
        value = value.strip().lower()
        if value in ("", "false", "no", "none", "unspecified"):
            return False
        if value in ("true", "yes"):
            return True
    if isinstance(value, float) and math.isnan(value):
        return False  # Tables write what is missing so.
    return number(value, what) != 0


def _common_tail(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other)):
        if a != b:
            break
        count += 1
    return count


def _folded(name: str) -> str:
    """Returns a name as file systems without cases and accents keep it."""
    return unicodedata.normalize("NFC", name).casefold()


class Index:
    """The images of a folder, to be found by the names that tools write.

    Args:
        root: The folder.
        without: Names of folders in it, in lower case, that are left out.
    """

    def __init__(self, root: str, without: Sequence[str] = ()) -> None:
        self.root = root
        self.paths = [
            path
            for path in files(root, IMAGES)
            if not {*path.lower().split("/")[:-1]} & {*without}
        ]
        # Both exact names and folded ones.
        self._by_name = collections.defaultdict(list)
        for path in self.paths:
            name = os.path.basename(path)
            for key in {name, _folded(name)}:
                self._by_name[key].append(path)

    def find(self, name: str) -> str:
        """Returns the image that a file calls `name`, from the folder.

        It is found by the path; else by its tail, as the path may be another
        machine's; else by its last name, if that is unique. A mask in `labels`
        may share the place of the image.

        Raises:
            FileNotFoundError: There is none, or more than one.
        """
        slashes = name.replace("\\", "/")
        ways = [name, slashes, urllib.parse.unquote(slashes)]
        if "://" in slashes:  # What a server wants to know may follow the path.
            path = re.split("[?#]", slashes.split("://", 1)[1])[0]
            ways += [path, urllib.parse.unquote(path)]
        found: list[str] = []
        for way in dict.fromkeys(ways):
            full = os.path.join(self.root, way)
            if os.path.isfile(full):
                rest = os.path.relpath(full, self.root)
                outside = rest.split("/")[0] == ".."
                return os.path.normpath(way) if outside else rest
            parts = [part for part in way.split("/") if part not in ("", ".")]
            last = parts[-1] if parts else ""
            for key in (last, _folded(last)):
                found = found or self._nearest(parts, self._by_name.get(key))
        if len({place(x) for x in found}) == 1:
            found = _no_masks(found)
        if len(found) == 1:
            return found[0]
        where = shown(self.root)
        received = (
            f"{len(found)} files of this name: "
            + ", ".join(map(shown, found[:3]))
            + ". Of COCO, coco:FILE,IMAGES names one of their folders"
            if found
            else "no file of this name there"
        )
        if os.path.isdir(os.path.join(self.root, slashes)):
            received = "a folder"
        raise FileNotFoundError(
            f"Expected the image {name!r:.200} in {where!r}. Received: "
            f"{received}"
        )

    @staticmethod
    def _nearest(parts: list[str], found: list[str] | None) -> list[str]:
        """Returns the paths whose last folders agree most with `parts`."""
        if not found:
            return []
        tails = [_common_tail(parts[:-1], p.split("/")[:-1]) for p in found]
        return [p for p, n in zip(found, tails) if n == max(tails)]


def place(path: str) -> str:
    """Returns what an image's path and its label's path have in common.

    `train/images/a.b.png`, `images/train/a.b.png` and `labels/train/a.b.txt`
    have the place `train/a.b`.
    """
    *folders, name = path.split("/")
    kept = [f for f in folders if f.lower() not in _KINDS and f != "."]
    return "/".join([*kept, os.path.splitext(name)[0]])


def _no_masks(images: list[str]) -> list[str]:
    """Leaves out masks, which lie among the labels, for lack of better."""
    return [
        path
        for path in images
        if not {*path.lower().split("/")[:-1]} & {"annotations", "labels"}
    ] or images


def pair(images: Iterable[str], labels: Sequence[str]) -> dict[str, list[str]]:
    """Returns the images of each label file: one, if all is well.

    An image and its labels have the same place. What is left over on both sides
    is joined by the name alone, if it is unique.
    """
    by_place = collections.defaultdict(list)
    for image in images:
        by_place[place(image)].append(image)
    by_place = {where: _no_masks(x) for where, x in by_place.items()}
    result = {label: by_place.get(place(label), []) for label in labels}
    taken = set(map(place, labels))
    left = collections.defaultdict(list)
    for where, found in by_place.items():
        if where not in taken:
            left[os.path.basename(where)] += found
    alone = collections.Counter(stem(x) for x in labels if not result[x])
    for label in labels:
        if not result[label] and alone[stem(label)] == 1:
            result[label] = left.get(stem(label), [])
    return result


def lines(text: str) -> list[str]:
    """Returns the lines that are neither blank nor comments."""
    stripped = (line.strip() for line in re.split("[\r\n]+", text))
    return [line for line in stripped if line and not line.startswith("#")]


def read_names(path: str) -> list[str]:
    """Returns the names of a file with one in each line.

    Where each line begins with its own number from 0, that is its id.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line between names is blank: the ids would shift.
    """
    names = [line.strip() for line in read_text(path).strip().splitlines()]
    if "" in names:
        raise ValueError(
            f"Expected a name in each line of {shown(path)}. Received: a blank "
            f"line {names.index('') + 1}"
        )
    numbered = [re.fullmatch(r"(\d+)[:,]?\s+(.+)", name) for name in names]
    if all(x and int(x[1]) == i for i, x in enumerate(numbered)):
        names = [x[2] for x in numbered]
    return names
