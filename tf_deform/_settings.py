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


def existing(value: Any) -> str | list[str]:
    """Checks a file or folder that must be there, or several."""
    if isinstance(value, (list, tuple)) and value:
        return [existing(one) for one in value]
    path = path_text(value)
    if not os.path.exists(path):
        raise Wrong("a file or folder that exists")
    return path


FORMS = {
    "voc": "voc:ROOT or voc:ROOT:SPLIT",
    "coco": "coco:FILE,IMAGES",
    "masks": "masks:IMAGES,LABELS",
    "yolo": "yolo:ROOT",
}


def source(*forms: str) -> Callable[[Any], str]:
    """Returns a check for annotated photographs, such as `voc:photos`."""
    words = " or ".join(FORMS[form] for form in forms)

    def check(value: Any) -> str:
        form, colon, rest = str(value).partition(":")
        if not colon or form not in forms or not rest:
            raise Wrong(words)
        if form == "voc":
            return f"voc:{_voc_root(rest)}"
        if form == "yolo":
            return f"yolo:{_folder(rest, 'ROOT')}"
        first, comma, second = rest.rpartition(",")
        if not comma:
            raise Wrong(FORMS[form])
        if form == "coco":
            first = _file(first, "FILE")
        else:
            first = _folder(first, "IMAGES")
        second = _folder(second, "IMAGES" if form == "coco" else "LABELS")
        return f"{form}:{first},{second}"

    return check


def _voc_root(rest: str) -> str:
    """Returns `ROOT` or `ROOT:SPLIT` with an absolute path."""
    root, colon, split = rest.rpartition(":")
    if os.path.isdir(rest) or not colon:
        return _folder(rest, "ROOT")
    return f"{_folder(root, 'ROOT')}:{split}"


def _folder(text: str, name: str) -> str:
    path = path_text(text)
    if not os.path.isdir(path):
        raise Wrong(f"a source whose {name} is a folder; {path} is none")
    return path


def _file(text: str, name: str) -> str:
    path = path_text(text)
    if not os.path.isfile(path):
        raise Wrong(f"a source whose {name} is a file; {path} is none")
    return path


def source_or_share(*forms: str) -> Callable[[Any], str | float]:
    """Returns a check for photographs of their own, or a share of others."""

    def check(value: Any) -> str | float:
        try:
            share = float(value)
        except (TypeError, ValueError):
            return source(*forms)(value)
        if isinstance(value, bool) or not 0 < share < 1:
            raise Wrong("a share above 0 and below 1, or photographs")
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
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text):
        raise Wrong("a name of keras.applications, or a .keras file")
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
        default: The default, or `REQUIRED`. None: others decide, see `help`.
        help: What it is, for the command line.
        metavar: How the command line calls the value.
        bare: The value that the command line's option has without one.
    """

    check: Callable[[Any], Any]
    default: Any
    help: str
    metavar: str | None = None
    bare: Any = None


_BOXES = ("voc", "coco", "yolo")
_READING = {
    "classes": Setting(
        names,
        None,
        "names of the classes in their order (default: those of the data)",
        "A,B,C",
    ),
    "skip_broken": Setting(
        boolean, False, "leave out broken files, instead of an error"
    ),
}
_READING_BOXES = {
    "base": Setting(
        whole(0, 1),
        0,
        "number of the first pixel in VOC's xml: 0, as tools of today write, "
        "or 1, as the original",
        "0|1",
    ),
    "first_id": Setting(
        whole(0, 1),
        None,
        "number of the first class in YOLO's text files, where the names have "
        "no numbers",
        "0|1",
    ),
    "crowds": Setting(
        one_of("ignore", "objects"),
        "ignore",
        "COCO's crowds: neither learned nor counted as missed, or objects as "
        "others",
        "ignore|objects",
    ),
}


def _training(
    forms: tuple[str, ...], size: int, rate: str, own: Mapping[str, Setting]
) -> dict[str, Setting]:
    """Returns the settings of a training task."""
    words = "; ".join(FORMS[form] for form in forms)
    return {
        "data": Setting(
            source(*forms),
            REQUIRED,
            f"photographs to learn from: {words}",
            "SOURCE",
        ),
        "out": Setting(path_text, REQUIRED, "folder of the run", "FOLDER"),
        "val": Setting(
            source_or_share(*forms),
            0.2,
            "photographs for validation, or which share of --data is kept "
            "for it",
            "SOURCE|SHARE",
        ),
        "resume": Setting(
            boolean,
            False,
            "go on with the run in the folder, with the settings that it has",
        ),
        **own,
        "backbone": Setting(
            backbone,
            "resnet50",
            "a name of keras.applications in small letters, or a .keras file",
            "NAME|FILE",
        ),
        "weights": Setting(
            weights,
            None,
            "the backbone's weights at the start (default: imagenet, or those "
            "of the .keras file). Unless it is none, the stem, stage c2 and "
            "batch normalization stay frozen",
            "imagenet|none|FILE",
        ),
        "deform": Setting(
            stages,
            "c3-c5",
            "stages of the backbone whose convolutions become deformable",
            "c3-c5|none",
        ),
        "size": Setting(
            divisible(32, 64, 8192),
            size,
            "height and width of the images that the model sees, in pixels",
            "PIXELS",
        ),
        "tile": _TILE,
        "batch_size": Setting(whole(1, 4096), 2, "images in a step", "N"),
        "epochs": Setting(whole(1), 12, "passes over the photographs", "N"),
        "steps": Setting(whole(1), None, "steps, in place of --epochs", "N"),
        "flips": Setting(
            one_of("horizontal", "all", "none"),
            "horizontal",
            "mirror the images in training: left and right, or also up and "
            "down, for views from above",
            "horizontal|all|none",
        ),
        "lr": Setting(
            number(0.0, 100.0),
            None,
            f"highest learning rate (default: {rate} for 16 images in a step, "
            "for others in proportion)",
            "RATE",
        ),
        "ema": Setting(
            number(0.0, 0.99999),
            None,
            "momentum, such as .999, of averages of the weights, which are "
            "judged and kept as the best (default: no averages)",
            "MOMENTUM",
        ),
        "seed": Setting(
            whole(0, 2**31 - 1),
            0,
            "seed of weights, order and augmentation",
            "N",
        ),
        "deterministic": Setting(
            boolean, False, "compute the same bits every time, which is slower"
        ),
        "mixed_precision": Setting(
            one_of("bfloat16", "float16"),
            None,
            "compute in 16 bits: bfloat16 (where only the option is given), or "
            "float16 for older GPUs",
            "bfloat16|float16",
            "bfloat16",
        ),
        "jit": Setting(boolean, False, "compile the training step with XLA"),
        **_READING,
    }


_TILE = Setting(
    whole(32, 65536),
    None,
    "cut photographs into overlapping squares of this many pixels",
    "PIXELS",
)
_MAX_DETECTIONS = Setting(
    whole(1, 10000),
    100,
    "most boxes of an image that are predicted and judged",
    "N",
)
_MODEL = Setting(existing_file, REQUIRED, "a model, such as run/best.keras")

TASKS: Mapping[str, Mapping[str, Setting]] = {
    "train_detector": {
        **_training(
            _BOXES,
            640,
            ".02",
            {
                "model": Setting(
                    one_of("faster-rcnn", "rfcn"),
                    "faster-rcnn",
                    "the detector",
                    "faster-rcnn|rfcn",
                ),
                "pooling": Setting(
                    one_of("align", "deform", "moddeform"),
                    "align",
                    "how faster-rcnn pools regions: plain, deformable or "
                    "modulated deformable",
                    "align|deform|moddeform",
                ),
                "max_detections": _MAX_DETECTIONS,
            },
        ),
        **_READING_BOXES,
    },
    "train_segmenter": _training(
        ("masks",),
        512,
        ".01",
        {
            "output_stride": Setting(
                lambda value: int(one_of("8", "16", "32")(str(value))),
                16,
                "pixels of the image for one of the last map",
                "8|16|32",
            ),
        },
    ),
    "evaluate": {
        "model": _MODEL,
        "data": Setting(
            source(*FORMS),
            REQUIRED,
            f"photographs to predict: {'; '.join(FORMS.values())}",
            "SOURCE",
        ),
        "out": Setting(
            path_text,
            None,
            "folder for metrics.json and results.json (default: none)",
            "FOLDER",
        ),
        "tile": _TILE,
        "max_detections": _MAX_DETECTIONS._replace(
            default=None,
            help="most boxes of an image that are predicted and judged "
            "(default: the model's)",
        ),
        "skip_broken": _READING["skip_broken"],
        **_READING_BOXES,
    },
    "show": {
        "model": _MODEL,
        "images": Setting(
            existing, REQUIRED, "photographs, or folders of photographs"
        ),
        "out": Setting(
            path_text, REQUIRED, "folder for one picture each", "FOLDER"
        ),
        "score": Setting(
            number(0.0, 1.0, also_least=True), 0.3, "least score of a box", "S"
        ),
        "tile": _TILE,
        "sampling": Setting(
            boolean, False, "draw also where deformable layers look"
        ),
    },
    "export_model": {
        "model": _MODEL,
        "path": Setting(
            export_path,
            REQUIRED,
            "model.onnx, model.tflite, or a folder for a SavedModel",
        ),
        "portable": Setting(
            boolean,
            False,
            "a SavedModel of TensorFlow's own operations, which needs no "
            "tf-deform where it runs",
        ),
        "quantize": Setting(
            one_of("float16", "dynamic"),
            None,
            "smaller weights of a .tflite file (default: float32)",
            "float16|dynamic",
        ),
    },
    "demo": {
        "name": Setting(one_of("trees", "digits"), REQUIRED, "trees or digits"),
        "out": Setting(
            path_text, None, "folder for results (default: runs/NAME)", "FOLDER"
        ),
        "full": Setting(boolean, False, "three seeds, and all controls"),
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
    if task == "train_detector" and found["model"] == "rfcn":
        if found["pooling"] != "align":
            raise ValueError(
                f"Expected {spell('pooling')} for faster-rcnn alone, as rfcn "
                "always pools with displacements. Received: "
                f"{found['pooling']}"
            )
    if task == "export_model":
        kind = export_format(found["path"])
        for name, only in (("portable", "saved_model"), ("quantize", "litert")):
            if found[name] and kind != only:
                wanted = "a folder" if name == "portable" else "a .tflite file"
                raise ValueError(
                    f"Expected {spell(name)} for {wanted} alone. Received: "
                    f"{found['path']}"
                )
