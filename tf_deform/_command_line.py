# SPDX-License-Identifier: Apache-2.0
"""Parses the commands that run `tf_deform.tasks`.

As `_settings.py`, this file is loaded by its path, without TensorFlow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

# The words of a command, its task, and its help.
COMMANDS = {
    ("train", "detect"): (
        "train_detector",
        "train a detector on photographs with boxes",
    ),
    ("train", "segment"): (
        "train_segmenter",
        "train a segmenter on photographs with masks",
    ),
    ("eval",): ("evaluate", "judge a model on annotated photographs"),
    ("show",): ("show", "draw what a model finds in photographs"),
    ("export",): ("export_model", "write a model for other programs"),
    ("demo",): ("demo", "compare plain and deformable models"),
}
_TRAIN_HELP = "train a model on photographs"
# Values without an option's name, and how many there are.
_POSITIONAL = {
    "evaluate": {"model": None},
    "show": {"model": None, "images": "+"},
    "export_model": {"model": None, "path": None},
    "demo": {"name": None},
}
_MORE = (
    "The exit status is 0 if all is done, 1 if something failed, 2 for wrong "
    "arguments."
)
# How a value is called, and what it is; of a task, or of all.
_HELP = {
    "data": (
        "SOURCE",
        "photographs with annotations: voc:ROOT, voc:ROOT:PART, "
        "coco:FILE, coco:FILE,IMAGES, yolo:ROOT or yolo:ROOT:PART",
    ),
    "train_segmenter.data": (
        "SOURCE",
        "photographs with masks: masks:IMAGES,LABELS",
    ),
    "evaluate.data": (
        "SOURCE",
        "photographs with annotations, as in training",
    ),
    "out": ("FOLDER", "folder of the run"),
    "evaluate.out": (
        "FOLDER",
        "new folder for metrics.json, pictures, and results.json of a detector "
        "or masks of a segmenter (default: none)",
    ),
    "show.out": (
        "FOLDER",
        "folder for one picture each, and of a segmenter for one mask",
    ),
    "demo.out": ("FOLDER", "folder for results (default: runs/NAME)"),
    "val": (
        "SOURCE|SHARE",
        "photographs for validation, or the share of --data that is kept for "
        "it",
    ),
    "resume": (
        None,
        "go on with the run in the folder; it has its settings, data included. "
        "A larger --steps, or --epochs where the run has it, makes it longer",
    ),
    "train_detector.model": ("faster-rcnn|rfcn", "the detector"),
    "model": (None, "a model, such as run/best.keras"),
    "pooling": (
        "align|deform|moddeform",
        "how faster-rcnn pools regions: plain, deformable or modulated "
        "deformable",
    ),
    "output_stride": ("8|16|32", "pixels of the image for one of the last map"),
    "anchor_scales": (
        "SCALES",
        "sizes of the anchors, roots of their areas in strides of their map: "
        "smaller ones for smaller objects (default: 8, of rfcn 4,8,16,32)",
    ),
    "max_detections": ("N", "most boxes of an image, predicted and judged"),
    "backbone": (
        "NAME|FILE",
        "a name of keras.applications in small letters, or a .keras file",
    ),
    "weights": (
        "imagenet|none|FILE",
        "the backbone's weights at the start (default: imagenet, or those of "
        "the .keras file). Unless it is none, the stem, stage c2 and batch "
        "normalization stay frozen",
    ),
    "demo.weights": (
        "FILE",
        "for trees, the file open_nsfw.onnx (default: fetched)",
    ),
    "deform": (
        "c3-c5|none",
        "stages of the backbone whose convolutions become deformable, by the "
        "stride of their maps: where a model keeps a stride of 16 (segment, "
        "rfcn), c4 is all of the last ones",
    ),
    "channels": (
        "N",
        "channels of what stands on the backbone, whose hidden layers have "
        "four times as many (default: 256): 64 takes a fraction of the time, "
        "and of the file",
    ),
    "size": (
        "PIXELS",
        "height and width of the images that the model sees",
    ),
    "tile": (
        "PIXELS",
        "cut photographs into squares of this size, in training and "
        "prediction; the model sees each in its --size",
    ),
    "batch_size": ("N", "images in a step"),
    "epochs": ("N", "passes over the photographs"),
    "steps": ("N", "steps, in place of --epochs"),
    "val_every": (
        "STEPS",
        "steps from one validation, after which the run is saved, to the next "
        "(default: those of a pass over the photographs)",
    ),
    "flips": (
        "horizontal|all|none",
        "how images are mirrored in training; all is for views from above",
    ),
    "lr": (
        "RATE",
        "highest learning rate, taken as it is (default: .02, of segmenters "
        ".01, times --batch-size / 16)",
    ),
    "ema": (
        "MOMENTUM",
        "momentum, such as .999, of averages of the weights, which are judged "
        "and kept as the best (default: no averages)",
    ),
    "seed": ("N", "seed of weights, order and augmentation"),
    "deterministic": (None, "compute the same bits every time; slower"),
    "mixed_precision": (
        "bfloat16|float16",
        "compute in 16 bits: bfloat16, or float16 for older GPUs",
    ),
    "jit": (None, "compile the training step with XLA"),
    "classes": (
        "A,B,C",
        "names of the classes in their order (default: those of the data)",
    ),
    "show.skip_broken": (None, "broken photographs are no error at the end"),
    "skip_broken": (None, "leave out broken files, instead of an error"),
    "base": (
        "0|1",
        "first pixel of VOC's xml: 0, as tools of today write, or 1, as the "
        "original",
    ),
    "first_id": (
        "-1|0|1",
        "first class of YOLO's files, where the names have no numbers",
    ),
    "crowds": (
        "ignore|objects",
        "COCO's crowds: not learned, and not judged, or objects as others",
    ),
    "colours": (
        "voc",
        "masks are pictures in the colours of Pascal VOC (default: they hold "
        "ids, or the tool's list of colours lies beside)",
    ),
    "images": (None, "photographs, or folders of photographs"),
    "score": ("S", "least score of a box"),
    "sampling": (
        None,
        "draw also where deformable layers look at the best box or, without "
        "boxes, at the middle of the photograph",
    ),
    "path": (None, "model.onnx, model.tflite, or a folder for a SavedModel"),
    "portable": (
        None,
        "a SavedModel of TensorFlow's own operations, which needs no tf-deform "
        "where it runs",
    ),
    "sample": (
        "PHOTO",
        "photographs on which the file is compared with the model (default: "
        "made-up pixels)",
    ),
    "tolerance": (
        "SHARE",
        "largest difference of the file's outputs, relative to the largest "
        "number of each (default: .001)",
    ),
    "name": (None, "trees or digits"),
    "full": (None, "three seeds, all controls, and more steps for trees"),
}
# Options of one or more values.
_SEVERAL = ("sample",)
# Options that may come without a value, which then is this one.
_BARE = {"mixed_precision": "bfloat16"}


def option(name: str) -> str:
    """Returns how the command line spells a setting."""
    return "--" + name.replace("_", "-")


def add_commands(commands: Any, settings: ModuleType) -> None:
    """Adds the commands of all tasks to a parser's subparsers.

    Args:
        commands: What `add_subparsers` returned.
        settings: The module `_settings`.
    """
    groups = {(): commands}
    for words, (task, text) in COMMANDS.items():
        group = words[:-1]
        if group not in groups:
            above = commands.add_parser(group[0], help=_TRAIN_HELP)
            # Messages call the missing word so.
            names = [other[-1] for other in COMMANDS if other[:-1] == group]
            groups[group] = above.add_subparsers(
                metavar="|".join(names), required=True
            )
        parser = groups[group].add_parser(
            words[-1],
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MORE,
        )
        _add_settings(parser, task, settings)
        parser.set_defaults(task=task, parser=parser)


def _add_settings(
    parser: argparse.ArgumentParser, task: str, settings: ModuleType
) -> None:
    positional = _POSITIONAL.get(task, {})
    for name, setting in settings.TASKS[task].items():
        metavar, text = _HELP.get(f"{task}.{name}") or _HELP[name]
        kind = _argument(setting.check, settings)
        if name in positional:
            parser.add_argument(
                name,
                type=kind,
                nargs=positional[name],
                metavar=name.upper(),
                help=text,
            )
            continue
        if setting.check is settings.boolean:
            more = {"action": "store_true"}
        else:
            more = {"type": kind, "metavar": metavar}
        if name in _SEVERAL:
            more |= {"nargs": "+"}
        if name in _BARE:
            more |= {"nargs": "?", "const": _BARE[name]}
        if not any(setting.default is value for value in (None, False, ...)):
            text += f" (default: {setting.default})"
        parser.add_argument(
            option(name),
            # The settings of a run to resume tell what was given.
            default=argparse.SUPPRESS,
            # A run to resume has the settings that training requires.
            required=setting.default is ...
            and (name == "out" or "resume" not in settings.TASKS[task]),
            help=text,
            **more,
        )
    parser.add_argument(
        "--quiet", action="store_true", help="say warnings and errors alone"
    )


def _argument(
    check: Callable[[Any], Any], settings: ModuleType
) -> Callable[[str], Any]:
    """Returns a check with the error that argparse prints."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except settings.Wrong as wrong:
            raise argparse.ArgumentTypeError(
                f"Expected {wrong}. Received: {text!r:.300}"
            ) from None

    return parse


def find_settings(
    parsed: argparse.Namespace, settings: ModuleType, run_folder: ModuleType
) -> dict[str, Any]:
    """Returns all arguments of the task, or ends the process with status 2."""
    table = settings.TASKS[parsed.task]
    given = {name: vars(parsed)[name] for name in table if name in vars(parsed)}
    try:
        if "resume" in table:
            given = run_folder.open_run(parsed.task, table, given, option)
            # Files may have gone since the run began.
            given = settings.check(parsed.task, given)
        else:
            given = {**settings.defaults(parsed.task), **given}
        settings.check_together(parsed.task, given, option)
    except (ValueError, OSError) as error:
        parsed.parser.error(str(error))
    return given
