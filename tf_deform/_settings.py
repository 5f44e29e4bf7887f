# SPDX-License-Identifier: Apache-2.0
"""Describes the settings of `tf_deform.tasks`: what is expected, and defaults.

The functions of `tf_deform.tasks` check their arguments here. So does the
command `tf-deform`, which loads this file alone, by its path: importing the
package would load TensorFlow. So this file imports the standard library alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

REQUIRED = ...  # in place of a default
_spell = "`{}`".format


class Wrong(ValueError):
    """Says what a value should be; who catches it adds name and value."""


# What a value may be. Each function returns the value that a run uses, from the
# text of a command line or from a value of Python, or raises `Wrong`.


def whole(least: int, most: int | None = None) -> Callable[[Any], int]:
    """Returns a check for whole numbers."""
    limits = f"of at least {least}" if most is None else f"{least} to {most}"

    def check(value: Any) -> int:
        text = str(value)
        if not isinstance(value, bool) and re.fullmatch(r"-?[0-9]{1,18}", text):
            number = int(text)
            if least <= number and (most is None or number <= most):
                return number
        raise Wrong(f"a whole number {limits}")

    return check


def number(
    above: float, most: float = math.inf, *, also_least: bool = False
) -> Callable[[Any], float]:
    """Returns a check for finite numbers."""
    limits = f"{'of at least' if also_least else 'above'} {above:g}"
    if most < math.inf:
        limits += f" and at most {most:g}"

    def check(value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if (
            isinstance(value, bool)
            or not (above < found or (also_least and found == above))
            or not found <= most
            or math.isinf(found)
        ):
            raise Wrong(f"a number {limits}")
        return found

    return check


def one_of(*names: str) -> Callable[[Any], str]:
    """Returns a check for names."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise Wrong(" or ".join(names))
        return value

    return check


def boolean(value: Any) -> bool:
    """Checks a flag."""
    if not isinstance(value, bool):
        raise Wrong("True or False")
    return value


def divisible(by: int, least: int, most: int) -> Callable[[Any], int]:
    """Returns a check for whole numbers that are multiples of another."""

    def check(value: Any) -> int:
        try:
            found = whole(least, most)(value)
        except Wrong:
            found = 1
        if found % by:
            raise Wrong(f"a multiple of {by}, {least} to {most}")
        return found

    return check


def path_text(value: Any) -> str:
    """Checks a path, and makes it absolute, as a run may go on elsewhere."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise Wrong("a path")
    return os.path.abspath(os.path.expanduser(text))


def existing_file(value: Any) -> str:
    """Checks a file that must be there."""
    path = path_text(value)
    if not os.path.isfile(path):
        raise Wrong("a file that exists")
    return path


def existing_files(value: Any) -> str | list[str]:
    """Checks a file that must be there, or several."""
    if isinstance(value, (list, tuple)) and value:
        return [existing_file(one) for one in value]
    return existing_file(value)


def existing(value: Any) -> str | list[str]:
    """Checks a file or folder that must be there, or several."""
    if isinstance(value, (list, tuple)) and value:
        return [existing(one) for one in value]
    path = path_text(value)
    if not os.path.exists(path):
        raise Wrong("a file or folder that exists")
    return path


FORMS = {
    "voc": "voc:ROOT or voc:ROOT:PART",
    "coco": "coco:FILE or coco:FILE,IMAGES",
    "masks": "masks:IMAGES,LABELS",
    "yolo": "yolo:ROOT or yolo:ROOT:PART",
}


def source(*forms: str) -> Callable[[Any], str]:
    """Returns a check for annotated photographs, such as `voc:photos`."""
    words = " or ".join(FORMS[form] for form in forms)

    def check(value: Any) -> str:
        form, colon, rest = str(value).partition(":")
        if not colon or form not in forms or not rest:
            raise Wrong(words)
        if form in ("voc", "yolo"):
            root, part = _halves(rest, ":", _folder)
            found = _need(_folder, root, "ROOT")
            return f"{form}:{found}{part and ':' + part}"
        if form == "coco":
            file, images = _halves(rest, ",", os.path.isfile)
            file = _need(os.path.isfile, file, "FILE")
            if not images:  # The reader knows where tools put them.
                return f"coco:{file}"
            return f"coco:{file},{_need(_folder, images, 'IMAGES')}"
        images, labels = _halves(rest, ",", _folder, _folder)
        if not labels:
            raise Wrong(FORMS[form])
        images = _need(_folder, images, "IMAGES")
        return f"{form}:{images},{_need(_folder, labels, 'LABELS')}"

    return check


def _folder(path: str) -> bool:
    """Tells whether there is a folder, of a pattern such as `images/*.jpg`."""
    folder, name = os.path.split(path)
    return os.path.isdir(folder or "." if "*" in name else path)


def _halves(
    text: str,
    mark: str,
    first: Callable[[str], bool],
    second: Callable[[str], bool] = lambda path: True,
) -> tuple[str, str]:
    """Splits at a mark that is not within a path; the second may be empty."""
    parts = text.split(mark)
    halves = [
        (mark.join(parts[:i]), mark.join(parts[i:]))
        for i in range(len(parts), 0, -1)
    ]
    for one, other in halves:
        if first(os.path.expanduser(one)) and second(os.path.expanduser(other)):
            return one, other
    one, _, other = text.partition(mark)
    return one, other


def _need(there: Callable[[str], bool], text: str, name: str) -> str:
    """Returns the absolute path of a part of a source that must be there."""
    path = path_text(text)
    if not there(path):
        kind = "file" if there is os.path.isfile else "folder"
        raise Wrong(f"a source whose {name} is a {kind}; {path} is none")
    return path


def source_or_share(*forms: str) -> Callable[[Any], str | float]:
    """Returns a check for photographs of their own, or a share of others."""

    def check(value: Any) -> str | float:
        try:
            share = float(value)
        except (TypeError, ValueError):
            return source(*forms)(value)
        if isinstance(value, bool) or not 0 < share < 1:
            raise Wrong(
                "a share above 0 and below 1, such as 0.2, or photographs, "
                f"{FORMS[forms[0]]}"
            )
        return share

    return check


def stages(value: Any) -> str:
    """Checks the stages to make deformable."""
    found = re.fullmatch(r"none|c([1-7])(?:-(?:c([1-7]))?)?", str(value))
    if not found or (found[2] and found[1] > found[2]):
        raise Wrong("none or stages, such as c3-c5 or c5")
    return found[0]


def backbone(value: Any) -> str:
    """Checks a name of `keras.applications`, or a file of Keras."""
    text = str(value)
    if text.endswith((".keras", ".h5")) or os.sep in text:
        return existing_file(text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", text):
        raise Wrong(
            "a name of keras.applications, such as resnet50, or a .keras file"
        )
    return text


def weights(value: Any) -> str:
    """Checks where a backbone's weights come from."""
    if value in ("imagenet", "none"):
        return value
    try:
        return existing_file(value)
    except Wrong:
        raise Wrong("imagenet, none or a file that exists") from None


def names(value: Any) -> list[str]:
    """Checks a list of classes."""
    if isinstance(value, str):
        value = value.split(",")
    elif not isinstance(value, Iterable):
        value = [value]
    found = [name.strip() if isinstance(name, str) else "" for name in value]
    if not found or "" in found or len(set(found)) < len(found):
        raise Wrong("names that all differ, with commas between them")
    return found


def scales(value: Any) -> list[float]:
    """Checks a list of sizes of anchors."""
    if isinstance(value, str):
        value = value.split(",")
    elif not isinstance(value, Iterable):
        value = [value]
    try:
        found = [number(0.0, 1000.0)(one) for one in value]
    except Wrong:
        found = []
    if not found or len(set(found)) < len(found):
        raise Wrong(
            "numbers above 0 and at most 1000 that all differ, with commas "
            "between them"
        )
    return found


def export_path(value: Any) -> str:
    """Checks the path of an export, whose suffix says the format."""
    path = path_text(value)
    if export_format(path) is None:
        raise Wrong("a path such as model.onnx, model.tflite or model/")
    if not os.path.isdir(os.path.dirname(path)):
        raise Wrong("a path in a folder that exists")
    return path


def export_format(path: str) -> str | None:
    """Returns "onnx", "litert" or "saved_model", or None."""
    suffix = os.path.splitext(path)[1].lower()
    found = {".onnx": "onnx", ".tflite": "litert", "": "saved_model"}
    return found.get(suffix)


# What each task takes.


class Setting(NamedTuple):
    """Describes one setting.

    Attributes:
        check: Returns the value to use, or raises `Wrong`.
        default: The default, or `REQUIRED`. None: others decide, as the
            functions of `tf_deform.tasks` say.
    """

    check: Callable[[Any], Any]
    default: Any


_BOXES = ("voc", "coco", "yolo")
_TILE = Setting(whole(32, 65536), None)
_MAX_DETECTIONS = Setting(whole(1, 10000), 100)
_MODEL = Setting(existing_file, REQUIRED)
_SKIP_BROKEN = Setting(boolean, False)
_READING_BOXES = {
    "base": Setting(whole(0, 1), 0),
    "first_id": Setting(whole(-1, 1), None),
    "crowds": Setting(one_of("ignore", "objects"), "ignore"),
}
_READING_MASKS = {"colours": Setting(one_of("voc"), None)}


def _training(
    forms: tuple[str, ...], size: int, **own: Setting
) -> dict[str, Setting]:
    """Returns the settings of a training task."""
    return {
        "data": Setting(source(*forms), REQUIRED),
        "out": Setting(path_text, REQUIRED),
        "val": Setting(source_or_share(*forms), 0.2),
        "resume": Setting(boolean, False),
        **own,
        "backbone": Setting(backbone, "resnet50"),
        "weights": Setting(weights, None),
        "deform": Setting(stages, "c3-c5"),
        "channels": Setting(whole(1, 4096), None),
        "size": Setting(divisible(32, 64, 8192), size),
        "tile": _TILE,
        "batch_size": Setting(whole(1, 4096), 2),
        "epochs": Setting(whole(1), 12),
        "steps": Setting(whole(1), None),
        "val_every": Setting(whole(1), None),
        "flips": Setting(one_of("horizontal", "all", "none"), "horizontal"),
        "lr": Setting(number(0.0, 100.0), None),
        "ema": Setting(number(0.0, 0.99999), None),
        "seed": Setting(whole(0, 2**31 - 1), 0),
        "deterministic": Setting(boolean, False),
        "mixed_precision": Setting(one_of("bfloat16", "float16"), None),
        "jit": Setting(boolean, False),
        "classes": Setting(names, None),
        "skip_broken": _SKIP_BROKEN,
    }


TASKS: Mapping[str, Mapping[str, Setting]] = {
    "train_detector": {
        **_training(
            _BOXES,
            640,
            model=Setting(one_of("faster-rcnn", "rfcn"), "faster-rcnn"),
            pooling=Setting(one_of("align", "deform", "moddeform"), "align"),
            anchor_scales=Setting(scales, None),
            max_detections=_MAX_DETECTIONS,
        ),
        **_READING_BOXES,
    },
    "train_segmenter": {
        **_training(
            ("masks",),
            512,
            output_stride=Setting(
                lambda value: int(one_of("8", "16", "32")(str(value))), 16
            ),
        ),
        **_READING_MASKS,
    },
    "evaluate": {
        "model": _MODEL,
        "data": Setting(source(*FORMS), REQUIRED),
        "out": Setting(path_text, None),
        "tile": _TILE,
        "max_detections": _MAX_DETECTIONS._replace(default=None),
        "classes": Setting(names, None),
        "skip_broken": _SKIP_BROKEN,
        **_READING_BOXES,
        **_READING_MASKS,
    },
    "show": {
        "model": _MODEL,
        "images": Setting(existing, REQUIRED),
        "out": Setting(path_text, REQUIRED),
        "score": Setting(number(0.0, 1.0, also_least=True), 0.3),
        "tile": _TILE,
        "sampling": Setting(boolean, False),
        "skip_broken": _SKIP_BROKEN,
    },
    "export_model": {
        "model": _MODEL,
        "path": Setting(export_path, REQUIRED),
        "portable": Setting(boolean, False),
        "sample": Setting(existing_files, None),
        "tolerance": Setting(number(0.0, 1.0), None),
    },
    "demo": {
        "name": Setting(one_of("trees", "digits"), REQUIRED),
        "out": Setting(path_text, None),
        "weights": Setting(existing_file, None),
        "full": Setting(boolean, False),
    },
}


def defaults(task: str) -> dict[str, Any]:
    """Returns the settings of a task that have defaults."""
    return {
        name: setting.default
        for name, setting in TASKS[task].items()
        if setting.default is not REQUIRED
    }


def check(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks arguments of Python, and returns the values to use.

    Raises:
        ValueError: One of them is not what is expected.
    """
    found = {}
    for name, value in given.items():
        setting = TASKS[task][name]
        if value is None and setting.default is None:
            found[name] = None
            continue
        try:
            found[name] = setting.check(value)
        except Wrong as wrong:
            raise ValueError(
                f"Expected `{name}` to be {wrong}. Received: {value!r:.300}"
            ) from None
    return found


def check_together(
    task: str, found: Mapping[str, Any], spell: Callable[[str], str] = _spell
) -> None:
    """Checks values, each of which is right, beside each other.

    Args:
        task: The name of the task.
        found: All its settings.
        spell: How messages spell the name of a setting.

    Raises:
        ValueError: They do not fit together.
    """
    sources = [str(found.get(name, "")) for name in ("data", "val")]
    for name, form in (("base", "voc"), ("first_id", "yolo")):
        if found.get(name) and not any(x.startswith(form) for x in sources):
            raise ValueError(
                f"Expected {spell(name)} for {form} photographs alone. "
                f"Received: {', '.join(sources)}"
            )
    if found.get("name") == "digits" and found["weights"] is not None:
        raise ValueError(
            f"Expected {spell('weights')} for trees alone. Received: "
            f"{found['weights']}"
        )
    if task == "train_detector" and found["model"] == "rfcn":
        if found["pooling"] != "align":
            raise ValueError(
                f"Expected {spell('pooling')} for faster-rcnn alone, as rfcn "
                "always pools with displacements. Received: "
                f"{found['pooling']}"
            )
    if task == "export_model" and found["portable"]:
        if export_format(found["path"]) != "saved_model":
            raise ValueError(
                f"Expected {spell('portable')} for a folder alone. Received: "
                f"{found['path']}"
            )
