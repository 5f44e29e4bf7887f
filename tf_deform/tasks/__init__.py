# SPDX-License-Identifier: Apache-2.0
"""Trains, judges, shows and exports models of one's own photographs.

Each function is a command of `tf-deform`, and its arguments are the options of
the command. They need Keras 3, and `pip install 'tf-deform[train]'`; pictures
of sampling points need `[plots]`, and exports `[onnx]` or `[litert]`. Messages
go to the logger `tf_deform`.

Photographs with annotations are named by text:

- `voc:ROOT` or `voc:ROOT:PART`: Pascal VOC's xml, beside the images, or in the
  folders Annotations, JPEGImages and ImageSets;
- `coco:FILE` or `coco:FILE,IMAGES`: COCO's json, and the folder of the images,
  if they do not lie beside it;
- `yolo:ROOT` or `yolo:ROOT:PART`: text files with a line for each object;
- `masks:IMAGES,LABELS`: folders of images and of masks, for segmenters.

`tf_deform.data.read` says more of them.

`import tf_deform` does not import this package: `from tf_deform import tasks`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tf_deform import _settings
from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    raise ImportError(
        "Expected Keras 3 for tf_deform.tasks. Received: "
        f"{keras.__name__} {keras.__version__}, which TensorFlow's `tf.keras` "
        "is"
    )

from tf_deform.tasks import _evaluate, _run, _setup, _train
from tf_deform.tasks._run import progress

__all__ = [
    "demo",
    "evaluate",
    "export_model",
    "progress",
    "show",
    "train_detector",
    "train_segmenter",
]

_Path = os.PathLike


def train_detector(
    data: str,
    out: str | _Path,
    *,
    val: str | float = 0.2,
    resume: bool = False,
    model: str = "faster-rcnn",
    pooling: str = "align",
    anchor_scales: Sequence[float] | None = None,
    max_detections: int = 100,
    backbone: str | _Path = "resnet50",
    weights: str | _Path | None = None,
    deform: str = "c3-c5",
    channels: int | None = None,
    size: int = 640,
    tile: int | None = None,
    batch_size: int = 2,
    epochs: int | None = None,
    steps: int | None = None,
    val_every: int | None = None,
    flips: str = "horizontal",
    lr: float | None = None,
    ema: float | None = None,
    seed: int = 0,
    deterministic: bool = False,
    mixed_precision: str | None = None,
    jit: bool = False,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    base: int = 0,
    first_id: int | None = None,
    crowds: str = "ignore",
) -> dict[str, Any]:
    """Trains a detector on photographs with boxes.

        tf_deform.tasks.train_detector("voc:photos", "run", epochs=12)

    With the recipe "1x" of Detectron and mmdetection in the length of this run:
    momentum .9, a rate of .02 for steps of 16 images and less in proportion,
    which rises at first and is divided by 10 after 8 and after 11 twelfths, a
    tenth of the rate for offsets, weight decay 1e-4 (1e-3 as Keras
    counts it, beside the momentum), gradients of a norm of 10
    at most. Unless `weights` is "none", the stem, stage c2 and all batch
    normalization stay as they are.

    Before the first step it logs what the reader found odd, how many objects of
    which size there are, and how many of them no anchor fits.

    The folder then has

    - best.keras: the model of the validation with the best AP; last.keras: the
      state to go on from;
    - metrics.json: AP of each validation and class; results.json and
      truth.json: what best.keras found, and what is there, for COCO's own
      evaluation;
    - pictures: truth beside detections, and where the model looks;
    - settings.json, versions.json, files.json (the files of both parts, with
      their SHA-256), log.txt, and tensorboard.

    Args:
        data: The photographs to learn from: voc, coco or yolo.
        out: The folder of the run, new or empty.
        val: The photographs for validation, or the share of `data` that is kept
            for it. Its classes are joined with those of `data` by name.
        resume: Whether to go on with the run in the folder, from its last
            validation, with the same settings and the same files. With
            `deterministic`, the result is that of a run without a stop, to the
            bit. Only `steps`, or `epochs` without them, may be larger, also
            where the run is done: the learning rate is then that of the longer
            run, and may rise again.
        model: "faster-rcnn" or "rfcn".
        pooling: How "faster-rcnn" pools regions: "align", "deform" or
            "moddeform".
        anchor_scales: Roots of the anchors' areas, in strides of their map:
            smaller ones for smaller objects. None: those of the model, 8 for
            each map of "faster-rcnn", and 4, 8, 16 and 32 for the one map of
            "rfcn".
        max_detections: The most boxes of an image that are predicted and
            judged.
        backbone: A name of `keras.applications` in small letters, or a .keras
            file, see `tf_deform.models.backbone`.
        weights: The backbone's weights at the start: "imagenet", "none" or a
            file. None: "imagenet", or those of the .keras file.
        deform: The stages that become deformable, such as "c3-c5", or "none";
            see `tf_deform.make_deformable`.
        channels: Channels of what stands on the backbone: of the pyramid of
            "faster-rcnn", whose hidden layers have four times as many units. In
            "rfcn" twice as many propose regions, and four times as many score
            them. None: 256, as published; a small backbone needs fewer.
        size: Height and width, in pixels, of the images that the model sees.
        tile: Pixels of the squares that photographs are cut into, which the
            model then sees in its `size`, in training and prediction. None:
            photographs are seen as a whole.
        batch_size: The number of images in a step.
        epochs: The number of passes over the photographs. None: 12.
        steps: The number of steps, in place of `epochs`.
        val_every: The number of steps from one validation to the next. After
            each, the state is saved. None: the steps of a pass over the
            photographs.
        flips: How images are mirrored in training: "horizontal", "all" (for
            views from above) or "none".
        lr: The highest learning rate.
        ema: The momentum of averages of the weights, which are judged and kept
            as the best.
        seed: The seed of weights, order and augmentation, and of the split.
        deterministic: Whether the same seed gives the same bits. It turns on
            TensorFlow's determinism for the rest of the process.
        mixed_precision: "bfloat16" or "float16".
        jit: Whether to compile steps with XLA.
        classes: The names of the classes, in their order. None: those of the
            data.
        skip_broken: Whether to leave out broken files, instead of an error.
        base: The number of the first pixel in VOC's xml.
        first_id: The number of the first class in YOLO's files, where the names
            have no numbers.
        crowds: COCO's crowds: "ignore", or "objects" as others.

    Returns:
        What metrics.json holds: "validation" (what best.keras reaches), "best"
        (the logs of its epoch), "epochs" (the logs of all epochs).

    Raises:
        ValueError: An argument is not what is expected, the folder has a run
            with other settings or files, or the data are broken.
        OSError: A file cannot be read or written; the folder has other things;
            weights cannot be fetched; another process trains there.
        ImportError: An extra is not installed.
        FloatingPointError: The loss or a weight is no number.
        MemoryError: A step does not fit into memory.
    """
    return _train_in_folder("train_detector", locals())


def train_segmenter(
    data: str,
    out: str | _Path,
    *,
    val: str | float = 0.2,
    resume: bool = False,
    output_stride: int = 16,
    backbone: str | _Path = "resnet50",
    weights: str | _Path | None = None,
    deform: str = "c3-c5",
    channels: int | None = None,
    size: int = 512,
    tile: int | None = None,
    batch_size: int = 2,
    epochs: int | None = None,
    steps: int | None = None,
    val_every: int | None = None,
    flips: str = "horizontal",
    lr: float | None = None,
    ema: float | None = None,
    seed: int = 0,
    deterministic: bool = False,
    mixed_precision: str | None = None,
    jit: bool = False,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    colours: str | None = None,
) -> dict[str, Any]:
    """Trains a segmenter on photographs with masks.

        tf_deform.tasks.train_segmenter("masks:images,labels", "run")

    Pixels of the id 255 are not learned, nor judged. The folder has what
    `train_detector` says, and best.keras has the best mean IoU.

    Args:
        data: The photographs to learn from: masks.
        out, val, resume: As in `train_detector`.
        output_stride: Pixels of the image for one of the backbone's last map:
            8, 16 or 32.
        backbone, weights, deform, channels, size, tile: As in
            `train_detector`.
        batch_size, epochs, steps, val_every, flips: As in `train_detector`.
        lr: The highest learning rate. None: .01 for steps of 16 images, and
            less in proportion.
        ema, seed, deterministic, mixed_precision, jit: As in `train_detector`.
        classes, skip_broken: As in `train_detector`.
        colours: "voc" if the masks are pictures in the colours of Pascal VOC.
            None: they hold ids, or a tool's list of colours lies beside.

    Returns:
        What metrics.json holds, see `train_detector`.

    Raises:
        ValueError, OSError, ImportError: As in `train_detector`.
        FloatingPointError, MemoryError: As in `train_detector`.
    """
    return _train_in_folder("train_segmenter", locals())


def _train_in_folder(task: str, given: dict[str, Any]) -> dict[str, Any]:
    # None is the default or, of a run to resume, what the run has.
    given = {
        name: value
        for name, value in given.items()
        if value is not None or not (given["resume"] or name == "epochs")
    }
    with _run.opened(task, given) as run, _setup.reproducible(run.settings):
        return getattr(_train, task)(run)


def evaluate(
    model: str | _Path,
    data: str,
    *,
    out: str | _Path | None = None,
    tile: int | None = None,
    max_detections: int | None = None,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    base: int = 0,
    first_id: int | None = None,
    crowds: str = "ignore",
    colours: str | None = None,
) -> dict[str, float]:
    """Judges a model on annotated photographs.

        tf_deform.tasks.evaluate("run/best.keras", "voc:others")

    Args:
        model: A file of `train_detector` or `train_segmenter`.
        data: The photographs, whose classes are joined with the model's by
            name.
        out: A folder for metrics.json, for pictures (truth beside what the
            model finds, for the first eight photographs) and, of a detector,
            for results.json and truth.json, with which other programs compute
            the same numbers; of a segmenter, for the folder masks, with what it
            finds in each photograph, as `show` writes it, by the photograph's
            name. It has none of these yet.
        tile: As in `train_detector`.
        max_detections: The most boxes of an image. None: the model's.
        classes: Names of the classes of `data`, where its files tell ids alone.
        skip_broken, base, first_id, crowds: As in `train_detector`.
        colours: As in `train_segmenter`.

    Returns:
        What metrics.json holds, and the command prints to standard output as
        JSON. For a detector what `tf_deform.training.CocoEvaluator.evaluate`
        returns; for a segmenter "mIoU", the mean over classes of intersection
        over union, "accuracy", the share of right pixels, and "IoU/<class>". A
        number of which there is no object is NaN here, null in JSON and "none"
        in the log.

    Raises:
        ValueError: An argument is not what is expected, or data are broken.
        OSError: A file cannot be read or written.
        ImportError: An extra is not installed.
    """
    return _evaluate.evaluate(_check("evaluate", locals()))


def show(
    model: str | _Path,
    images: str | _Path | Sequence[str | _Path],
    out: str | _Path,
    *,
    score: float = 0.3,
    tile: int | None = None,
    sampling: bool = False,
    skip_broken: bool = False,
) -> list[pathlib.Path]:
    """Draws what a model finds in photographs.

    Of `photo.jpg` it writes photo.png, the photograph with boxes or in the
    colours of classes, whose names are below it: a class 0 that is called
    "background" or "_background_" has none. Of a segmenter, photo-mask.png has
    the ids of the classes, `(height, width)` of the photograph, as uint8 pixels
    with a palette.

    Args:
        model: A file of `train_detector` or `train_segmenter`.
        images: Photographs, or folders of photographs.
        out: The folder for the PNG files, made where missing.
        score: The least score of a box that is drawn.
        tile: As in `train_detector`.
        sampling: Whether to draw also, as photo-sampling.png, where the
            deformable layers look at the middle of the best box or, of a
            segmenter or without a box, of the photograph.
        skip_broken: Whether broken photographs are told in the log alone. All
            others are drawn in any case.

    Returns:
        The files.

    Raises:
        ValueError: An argument is not what is expected, or a photograph is
            broken; with `skip_broken`, all are. It is raised after the others
            are drawn. A model has more than 256 classes, for masks.
        OSError: A file cannot be written.
        ImportError: An extra is not installed.
    """
    return _evaluate.show(_check("show", locals()))


def export_model(
    model: str | _Path,
    path: str | _Path,
    *,
    portable: bool = False,
    sample: str | _Path | Sequence[str | _Path] | None = None,
    tolerance: float | None = None,
) -> pathlib.Path:
    """Writes a model for other programs, and compares it with the model.

    The suffix of the path says what is written:

    - a folder, a SavedModel: of a detector, from bytes of JPEG or PNG files, of
      any size, to boxes in pixels of these images, scores, classes and their
      names;
    - .onnx or .tflite: from uint8 images `(1, size, size, 3)`, RGB, to the
      same in pixels of the input. A photograph is scaled by size / its longer
      side and placed at the top left; boxes are divided by this scale.

    A file model.json, in the folder or beside the file (`model.onnx.json`),
    names the classes and the size.

    Args:
        model: A file of `train_detector` or `train_segmenter`.
        path: What to write. An earlier export is replaced.
        portable: Whether a SavedModel has TensorFlow's own operations alone.
        sample: Photographs on which the file is compared with the model. None:
            made-up pixels.
        tolerance: The largest difference allowed, relative to the largest
            number of an output; of segmenters, the share of pixels with another
            class. Detections are compared with their counterparts: those whose
            scores nearly tie may come in another order. None: 1e-3.

    Returns:
        The path.

    Raises:
        ValueError: An argument is not what is expected.
        OSError: A file cannot be read or written.
        ImportError: An extra is not installed.
        RuntimeError: The exported model computes something else.
    """
    return _evaluate.export_model(_check("export_model", locals()))


def demo(
    name: str,
    *,
    out: str | _Path | None = None,
    weights: str | _Path | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """Compares plain and deformable models on data that are fetched or made.

    Args:
        name: "trees": detectors of trees in aerial photographs. "digits":
            segmenters and detectors of handwritten digits.
        out: The folder for results. None: `runs/` and the name.
        weights: For trees, the file open_nsfw.onnx. None: it is fetched.
        full: Whether to train three seeds, and all controls; for trees also
            800 steps in place of 320.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: An argument is not what is expected.
        OSError: A file cannot be fetched, read or written.
        ImportError: An extra is not installed.
    """
    settings = _check("demo", locals())
    from tf_deform.demo import run

    return run(**settings)


def _check(task: str, given: dict[str, Any]) -> dict[str, Any]:
    names = _settings.TASKS[task]
    found = _settings.check(task, {name: given[name] for name in names})
    _settings.check_together(task, found)
    return found
