# SPDX-License-Identifier: Apache-2.0
"""What all forms of annotations share: from objects as told to photographs.

A reader makes one `Draft` for each photograph, with `collect`, and `finish`
makes `Annotations` of them. What is wrong with one file is an error of that
file, and what is odd is counted in `Notes`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform.data._folders import shown
from tf_deform.data._images import Header
from tf_deform.data._records import Annotations, Mask, Photograph

_THREADS = 8  # They wait for disks, and decode outside of Python.
_NAMED = 3  # So many examples are named in a line of the log.
# An edge that is further outside than rounding puts it, in pixels.
_OUTSIDE = 0.5
# Oddities of objects.
CLIPPED = "boxes reach beyond their image and were clipped"
EMPTY = "boxes without width or height were dropped"
INVERTED = "boxes had exchanged edges, which were put in order"
FOREIGN = "images in folders without an annotated image were left out"
LOST = "boxes outside their image were dropped"
REPEATED = "objects that repeat another in all fields were dropped"
DOUBLE = "objects with the class and box of another were kept"
STORED = (
    "images are turned by EXIF but annotated as they are stored; their boxes "
    "or masks were turned"
)
TURNED = "images are turned by EXIF and annotated upright"
ANIMATED = "images are animated; the first picture was taken"
GREY = (
    "images are gray or have a palette, as masks do, and were read as "
    "photographs"
)


class Notes:
    """Counts what is odd, and names the first files."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._counts = collections.Counter()

    def add(self, what: str, where: str, count: int = 1) -> None:
        if count:
            self._counts[what] += count
            names = self._found.setdefault(what, [])
            if where not in names and len(names) <= _NAMED:
                names.append(where)

    def say(self, line: str) -> None:
        """Adds a line that counts nothing."""
        self._found.setdefault(line, [])

    def lines(self) -> tuple[str, ...]:
        result = []
        for what, names in self._found.items():
            if not names:
                result.append(what)
                continue
            text = ", ".join(map(shown, names[:_NAMED]))
            text += ", ..." if len(names) > _NAMED else ""
            result.append(f"{what}: {self._counts[what]} ({text})")
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class Told:
    """An object as a file tells it.

    Attributes:
        key: The name or id of its class.
        box: Left, upper, right and lower edge.
        crowd: Whether it is a group of objects.
        difficult: Whether it need not be found.
        all: All that the file says of it: an equal object repeats it.
        area: Pixels of the object itself, if the file tells its outline.
    """

    key: Hashable
    box: tuple[float, float, float, float]
    crowd: bool = False
    difficult: bool = False
    all: Any = None
    area: float | None = None


def _areas(draft: Draft) -> np.ndarray:
    """Returns areas of objects: of their boxes, where no outline is told.

    A box may have been cut at the edge of the image.
    """
    sides = (draft.boxes[:, 2:] - draft.boxes[:, :2]).astype(np.float64)
    boxes = sides.prod(-1)
    told = np.array([told.area or np.inf for told in draft.told])
    return np.minimum(boxes, told) if len(boxes) else boxes


@dataclasses.dataclass
class Draft:
    """A photograph whose labels are yet to be numbered."""

    path: str
    size: tuple[int, int]
    boxes: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 4), np.float32)
    )
    told: list[Told] = dataclasses.field(default_factory=list)
    mask: Mask | None = None
    odd: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )


def check_size(
    header: Header, size: tuple[float, float] | None, image: str
) -> bool:
    """Checks the size that a file claims for an image.

    Returns:
        Whether it is that of the image as it is stored, and not of the upright
        one: the tool paid no attention to EXIF.

    Raises:
        ValueError: It is neither.
    """
    if size is None or not all(size) or size == header.size:
        return False
    if size == header.stored:
        return True
    sizes = dict.fromkeys((header.size, header.stored))
    received = " or ".join(f"{w}x{h}" for w, h in sizes)
    raise ValueError(
        f"Expected {shown(image)} to have {size[0]:g}x{size[1]:g} pixels, as "
        f"its annotations say. Received: {received}. It was resized or cut "
        "since, or is another image"
    )


def _turn(
    boxes: np.ndarray, orientation: int, stored: tuple[int, int]
) -> np.ndarray:
    """Sets boxes upright, for EXIF's 5 to 8, which exchange the axes."""
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation in (7, 8):
        x = stored[0] - x
    if orientation in (6, 7):
        y = stored[1] - y
    new = np.stack([np.sort(y), np.sort(x)], axis=-1)
    return new.reshape(-1, 4)


def _unique(told: Sequence[Told]) -> list[Told]:
    kept: list[Told] = []
    alike = collections.defaultdict(list)
    for one in told:
        others = alike[one.key, one.box, one.crowd, one.difficult]
        if one.all not in others:
            others.append(one.all)
            kept.append(one)
    return kept


def draft(
    path: str,
    header: Header,
    told: Sequence[Told],
    size: tuple[float, float] | None = None,
) -> Draft:
    """Puts objects into an image: their boxes lie within it and have an area.

    Args:
        path: The image.
        header: Its header.
        told: Its objects, with finite boxes.
        size: The width and height that the file claims, if it does.

    Raises:
        ValueError: The size is not the image's.
    """
    odd = collections.Counter()
    if check_size(header, size, path):
        odd[STORED] += 1
    elif header.orientation > 1:
        odd[TURNED] += 1
    odd[ANIMATED] = int(header.animated)
    odd[GREY] = int(header.grey)
    unique = _unique(told)
    odd[REPEATED] = len(told) - len(unique)
    odd[DOUBLE] = len(unique) - len({(one.key, one.box) for one in unique})
    told = unique
    boxes = np.array([x.box for x in told], np.float64).reshape(-1, 4)
    ordered = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:])]
        + [np.maximum(boxes[:, :2], boxes[:, 2:])],
        axis=1,
    )
    odd[INVERTED] = np.any(boxes != ordered, axis=1).sum()
    if odd[STORED]:
        ordered = _turn(ordered, header.orientation, header.stored)
    limit = np.array([*header.size, *header.size], np.float64)
    clipped = np.clip(ordered, 0, limit).astype(np.float32)
    kept = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    thin = np.any(
        ordered[:, 2:].astype(np.float32) <= ordered[:, :2].astype(np.float32),
        axis=1,
    )
    odd[EMPTY] = thin.sum()
    odd[LOST] = (~kept & ~thin).sum()
    far = np.any(np.abs(clipped - ordered) > _OUTSIDE, axis=1)
    odd[CLIPPED] = (far & kept).sum()
    told = [x for x, keep in zip(told, kept) if keep]
    return Draft(path, header.size, clipped[kept], told, odd=odd)


def said(where: str, error: Exception) -> str:
    """Returns what is wrong with a file, with its name."""
    where, text = shown(where), str(error).rstrip(".")
    return text if where in text else f"{where}: {text}"


def refusal(broken: Sequence[str], count: int) -> str:
    """Returns an error's text that counts what is broken, and names ten.

    Args:
        broken: What is wrong, of each broken file.
        count: The number of all files.
    """
    more = len(broken) - 10
    text = "\n".join(broken[:10]) + (f"\nand {more} more" if more > 0 else "")
    return (
        f"Expected {count} sound files or images. Received: {len(broken)} that "
        f"are not:\n{text}"
    )


def collect(
    items: Iterable[tuple[str, Callable[[], Any]]],
    skip_broken: bool,
    notes: Notes,
) -> list[Any]:
    """Calls functions that each read one file, and gathers what is broken.

    Args:
        items: Names of files, and functions without arguments.
        skip_broken: Whether to leave out what is broken.
        notes: Takes the names of what was left out.

    Returns:
        The results in order.

    Raises:
        ValueError: Something is broken; all of it is counted, the first files
            are named.
    """

    def call(item: tuple[str, Callable[[], Any]]) -> Any:
        try:
            return item[1]()
        except (OSError, ValueError) as error:
            return error

    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(call, items))
    broken = [
        said(where, result)
        for (where, _), result in zip(items, results)
        if isinstance(result, Exception)
    ]
    if broken and not skip_broken:
        raise ValueError(
            f"{refusal(broken, len(items))}\n"
            "skip_broken=True (--skip-broken) leaves out their photographs"
        )
    for text in broken:
        notes.say(f"broken and left out: {text}")
    return [result for result in results if not isinstance(result, Exception)]


def _once(drafts: list[Draft], notes: Notes) -> list[Draft]:
    """Keeps one draft for each image: that with the most objects."""
    best: dict[str, Draft] = {}
    for one in drafts:
        other = best.get(one.path)
        if other is not None:
            notes.add(
                "images listed more than once; the entry with the most "
                "objects was taken",
                one.path,
            )
        if other is None or len(one.told) > len(other.told):
            best[one.path] = one
    return list(best.values())


def _check_pixels(drafts: list[Draft]) -> None:
    """Checks that boxes are not shares of the width and height.

    Raises:
        ValueError: All boxes lie between 0 and 1, and not on whole pixels.
    """
    boxes = np.concatenate([one.boxes for one in drafts])
    if len(boxes) and boxes.max() <= 1 and np.any(boxes != np.rint(boxes)):
        first = next(one for one in drafts if len(one.boxes))
        raise ValueError(
            "Expected boxes in pixels. Received: boxes that all lie between 0 "
            "and 1, which seem to be shares of width and height, first in "
            f"{shown(first.path)}: {first.boxes[0].tolist()}"
        )


def finish(
    drafts: list[Draft],
    names: Mapping[Hashable, str],
    classes: Sequence[str] | None,
    crowds: str,
    notes: Notes,
    *,
    hint: str = "",
) -> Annotations:
    """Makes annotations of drafts.

    Args:
        drafts: The photographs.
        names: The name of the class of each key, in the order of the labels.
            Keys may share a name.
        classes: The names in the order that the user wants, or None.
        crowds: "ignore", or "objects" to take crowds as objects.
        notes: What was odd.
        hint: What may help if a key has no name.

    Raises:
        ValueError: A key has no name, or nothing is there.
    """
    drafts = _once(drafts, notes)
    if not drafts:
        raise ValueError("Expected at least one photograph. Received: none")
    _check_pixels(drafts)
    order = list(dict.fromkeys(names.values()))
    unknown = collections.Counter()
    where = {}
    for one in drafts:
        for told in one.told:
            if told.key not in names:
                unknown[told.key] += 1
                where.setdefault(told.key, one.path)
    if unknown:
        text = ", ".join(
            f"id {key} of {count} objects, first in {shown(where[key])}"
            for key, count in unknown.items()
        )
        raise ValueError(
            f"Expected ids of the {len(names)} classes "
            + ", ".join(f"{key}: {name}" for key, name in names.items())
            + f". Received: {text}{hint}"
        )
    label = {key: order.index(name) for key, name in names.items()}
    counts = {what: collections.Counter() for what in ("", "crowd", "hard")}
    photographs = []
    for one in drafts:
        for what, count in one.odd.items():
            notes.add(what, one.path, int(count))
        if not one.told and one.mask is None:
            notes.add("images without objects were kept", one.path)
        for told in one.told:
            counts[""][names[told.key]] += 1
            counts["crowd"][names[told.key]] += told.crowd
            counts["hard"][names[told.key]] += told.difficult
        photographs.append(
            Photograph(
                one.path,
                *one.size,
                boxes=one.boxes,
                labels=[label[told.key] for told in one.told],
                crowd=[t.crowd and crowds == "ignore" for t in one.told],
                difficult=[told.difficult for told in one.told],
                mask=one.mask,
                areas=_areas(one),
            )
        )
    _say_counts(counts, order, crowds, notes)
    result = Annotations(order, photographs, notes.lines())
    return result if classes is None else result.select(classes)


def _say_counts(
    counts: dict[str, collections.Counter],
    order: list[str],
    crowds: str,
    notes: Notes,
) -> None:
    for key, what in (
        ("", "objects"),
        (
            "crowd",
            "crowds, left out of training and evaluation (crowds='objects' "
            "takes them as objects)"
            if crowds == "ignore"
            else "crowds, taken as objects",
        ),
        ("hard", "difficult objects, left out of training and evaluation"),
    ):
        total = sum(counts[key].values())
        if total:
            each = ", ".join(
                f"{name} {counts[key][name]}"
                for name in order
                if counts[key][name]
            )
            notes.say(f"{what}: {total} ({each})")
    unused = [name for name in order if not counts[""][name]]
    if unused and sum(counts[""].values()):
        notes.say(f"classes without an object: {', '.join(unused)}")
