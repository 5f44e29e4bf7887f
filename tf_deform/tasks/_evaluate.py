# SPDX-License-Identifier: Apache-2.0
"""Judges, shows and exports trained models."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _files, _run_folder, data, export, models, training
from tf_deform._keras import keras
from tf_deform._settings import export_format
from tf_deform.data._drafts import refusal, said
from tf_deform.data._folders import IMAGES
from tf_deform.tasks import _models, _pictures, _run, _setup

LOGGER = logging.getLogger("tf_deform")
_METRICS, _FOUND, _TRUTH = "metrics.json", "results.json", "truth.json"
_PICTURES, _MASKS = "pictures", "masks"
# How names of the files of one photograph end.
_ENDINGS = ("", "-mask", "-sampling")
MOST_PICTURES = 8
# The least score of a box that is drawn beside the truth.
_SCORE = 0.3


def evaluate(settings: Mapping[str, Any]) -> dict[str, float]:
    """Judges a model; see `tf_deform.tasks.evaluate`."""
    folder = settings["out"] and pathlib.Path(settings["out"])
    if folder:
        _check_free(folder)
    model = _models.load(
        settings["model"], settings["max_detections"], settings["tile"]
    )
    detector = _models.is_detector(model)
    form = settings["data"].partition(":")[0]
    if detector == (form == "masks"):
        kind = "a detector" if detector else "a segmenter"
        wanted = "voc, coco or yolo" if detector else "masks"
        raise ValueError(
            f"Expected `data` to be {wanted} photographs for {kind}. Received: "
            f"{settings['data']}"
        )
    classes = _models.class_names(model)
    truth = _setup.read(settings, settings["data"], classes)
    judge = _models.Judge(
        truth, detector, getattr(model, "max_detections", None)
    )
    found = models.predictions(model, truth.photographs)
    drawn: list[tuple[int, Any]] = []
    found = _models.first(found, MOST_PICTURES, drawn)
    if detector:
        found = list(found)
    with contextlib.ExitStack() as stack:
        if folder and not detector:
            found = stack.enter_context(
                _writing_masks(folder / _MASKS, found, truth.photographs, model)
            )
        measures = judge.evaluate(found)
    LOGGER.info("%s", _run.table(measures))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        if detector:
            results = judge.evaluator.results(found)
            training.write_metrics(folder / _FOUND, results)
            training.write_metrics(folder / _TRUTH, judge.evaluator.coco)
        training.write_metrics(folder / _METRICS, measures)
        draw_comparisons(folder / _PICTURES, model, truth.photographs, drawn)
        LOGGER.info("Written to %s", folder)
    return measures


def _check_free(folder: pathlib.Path) -> None:
    """Checks that no results would be replaced: those of a run, or others."""
    for name in (
        _run_folder.SETTINGS,
        _METRICS,
        _FOUND,
        _TRUTH,
        _PICTURES,
        _MASKS,
    ):
        if (folder / name).exists():
            raise FileExistsError(
                "Expected `out` to be a folder without results of other "
                f"models. Received: {folder}, which has {name}"
            )


@contextlib.contextmanager
def _writing_masks(
    folder: pathlib.Path,
    found: Iterator[tuple[int, Any]],
    photographs: Sequence[Any],
    model: keras.Model,
) -> Iterator[Iterator[tuple[int, Any]]]:
    """Yields predictions, of which each is written as it is taken.

    The folder appears at the end, with a mask for each photograph, of its name.
    """
    classes = _models.class_names(model)
    paths = [pathlib.Path(photograph.path) for photograph in photographs]
    names = _names(paths)
    for path, name in zip(paths, names):
        if name != path.stem:
            LOGGER.info("%s: its mask is %s.png", path, name)

    def written(folder: pathlib.Path) -> Iterator[tuple[int, Any]]:
        for number, ids in found:
            path = folder / f"{names[number - 1]}.png"
            _pictures.write_mask(path, ids, classes)
            yield number, ids

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _files.writing(folder, f"{names[0]}.png") as partial:
        partial.mkdir()
        yield written(partial)


def show(settings: Mapping[str, Any]) -> list[pathlib.Path]:
    """Draws what a model finds; see `tf_deform.tasks.show`."""
    images = settings["images"]
    paths = list(_images([images] if isinstance(images, str) else images))
    if not paths:
        raise ValueError(
            f"Expected photographs ({', '.join(sorted(IMAGES))}) in {images}. "
            "Received: none"
        )
    folder = pathlib.Path(settings["out"])
    names = _names(paths, _ENDINGS)
    sources = {path.resolve() for path in paths}
    for name in names:
        for picture in (f"{name}{ending}.png" for ending in _ENDINGS):
            if (folder / picture).resolve() in sources:
                raise FileExistsError(
                    "Expected `out` to be another folder than that of the "
                    f"photographs. Received: {folder}, whose {picture} would "
                    "be replaced"
                )
    if settings["sampling"]:
        _pictures.require_matplotlib()
    model = _models.load(settings["model"], tile=settings["tile"])
    if settings["sampling"] and not _pictures.has_offsets(model):
        LOGGER.warning("No pictures of sampling: no layer is deformable")
    classes = _models.class_names(model)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[pathlib.Path] = []
    broken = []
    for name, path in zip(names, paths):
        try:
            image = data.read_image(path)
        except (OSError, ValueError) as error:
            broken.append(said(str(path), error))
            LOGGER.warning("broken and left out: %s", broken[-1])
            continue
        found = model.predict_image(image)
        if _models.is_detector(model):
            picture = _pictures.boxes_picture(
                image, found, classes, settings["score"]
            )
            count = int(np.sum(found["scores"] >= settings["score"]))
            LOGGER.info("%s: %d box%s", path, count, "es" * (count != 1))
        else:
            picture = _pictures.mask_picture(image, found, classes)
            ids = np.unique(found)
            picture = _pictures.with_legend(picture, ids, classes)
            LOGGER.info("%s: %s", path, ", ".join(classes[i] for i in ids))
        written.append(folder / f"{name}.png")
        _pictures.write_picture(written[-1], picture)
        if not _models.is_detector(model):
            written.append(folder / f"{name}-mask.png")
            with _files.writing(written[-1]) as partial:
                _pictures.write_mask(partial, found, classes)
        if settings["sampling"]:
            path = folder / f"{name}-sampling.png"
            if draw_sampling(path, model, image, found):
                written.append(path)
    LOGGER.info("%d pictures written to %s", len(written), folder)
    if len(broken) == len(paths):
        raise ValueError(refusal(broken, len(paths)))
    if broken and not settings["skip_broken"]:
        raise ValueError(
            f"{refusal(broken, len(paths))}\nThe others are drawn; "
            "skip_broken=True (--skip-broken) makes this no error"
        )
    return written


def draw_comparisons(
    folder: pathlib.Path,
    model: keras.Model,
    photographs: Sequence[Any],
    found: Sequence[tuple[int, Any]],
) -> None:
    """Draws truth beside predictions.

    Args:
        folder: The folder for the pictures, made where missing.
        model: The model, which names the classes.
        photographs: The annotated photographs.
        found: Numbers of photographs, from 1, and what the model finds there.
    """
    folder.mkdir(exist_ok=True)
    classes = _models.class_names(model)
    for number, objects in found:
        photograph = photographs[number - 1]
        image = data.read_image(photograph.path)
        if _models.is_detector(model):
            pictures = [
                _pictures.boxes_picture(image, boxes, classes, _SCORE)
                for boxes in (_pictures.truth_of(photograph), objects)
            ]
            titles = "truth", f"found, score {_SCORE} or more"
        else:
            truth = data.read_mask(photograph.mask)[..., 0]
            pictures = [
                _pictures.mask_picture(image, ids, classes)
                for ids in (truth, objects)
            ]
            titles = "truth", "found"
        picture = _pictures.side_by_side(dict(zip(titles, pictures)))
        if not _models.is_detector(model):
            ids = np.union1d(truth, objects)
            picture = _pictures.with_legend(picture, ids, classes)
        _pictures.write_picture(folder / f"validation-{number}.png", picture)


def draw_sampling(
    path: pathlib.Path, model: keras.Model, image: np.ndarray, found: Any
) -> bool:
    """Draws where a model looks at its best box, or else at the centre."""
    point = np.array(image.shape[:2]) / 2
    place = "the middle of the photograph"
    if isinstance(found, Mapping) and len(found["boxes"]):
        x1, y1, x2, y2 = found["boxes"][0]
        point = np.array([(y1 + y2) / 2, (x1 + x2) / 2])
        place = "the middle of the best box"
    square, point = _models.view(model, image, point)
    return _pictures.write_sampling(path, model, square, point.tolist(), place)


def _images(sources: Sequence[str]) -> Iterator[pathlib.Path]:
    """Yields files, and the photographs in folders, sorted by name."""
    for source in map(pathlib.Path, sources):
        if source.is_dir():
            for path in sorted(source.iterdir()):
                if path.suffix.lower() in IMAGES:
                    yield path
        else:
            yield source


def _names(
    paths: Sequence[pathlib.Path], endings: Sequence[str] = ("",)
) -> list[str]:
    """Returns a name for each file, all different with any of the endings."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, count = path.stem, 1
        while not taken.isdisjoint(name + ending for ending in endings):
            count += 1
            name = f"{path.stem}-{count}"
        names.append(name)
        taken.update(name + ending for ending in endings)
    return names


# Exports.


def export_model(settings: Mapping[str, Any]) -> pathlib.Path:
    """Writes a model for other programs; see `tf_deform.tasks`."""
    model = _models.load(settings["model"])
    path = pathlib.Path(settings["path"])
    kind = export_format(str(path))
    if model.tile is not None:
        LOGGER.warning(
            "The model learned from tiles of %d pixels, and the file takes "
            "what it is given as a whole: give it such tiles of photographs",
            model.tile,
        )
    options = {"tolerance": settings["tolerance"], "verbose": False}
    sample = settings["sample"]
    photographs = [
        data.read_image(one)
        for one in ([sample] if isinstance(sample, str) else sample or [])
    ]
    LOGGER.info(
        "Writing the file, and comparing it with the model on %s: this takes "
        "minutes",
        "your photographs" if photographs else "made-up pixels",
    )
    if kind == "saved_model":
        _export_folder(model, path, settings["portable"], photographs, options)
        about = path / "model.json"
    else:
        _export_pixels(model, path, kind, photographs, options)
        about = path.with_name(path.name + ".json")
    files = kind == "saved_model"
    training.write_metrics(about, describe(model, files))
    LOGGER.info(
        "Written, with outputs as the model's: %s, and what it takes and "
        "gives: %s",
        path,
        about,
    )
    return path


def describe(model: keras.Model, files: bool = False) -> dict[str, Any]:
    """Returns what a program needs to know that runs an exported model.

    Args:
        model: The model.
        files: Whether it takes the bytes of files and answers in the pixels of
            photographs, or else takes the pixels of squares.
    """
    is_detector = _models.is_detector(model)
    told = {
        "kind": "detector" if is_detector else "segmenter",
        "classes": list(_models.class_names(model)),
        "size": model.image_size,
        "tile": model.tile,
    }
    if files:
        return {
            **told,
            "input": "(batch,) strings: the bytes of JPEG or PNG files",
            **(
                {"boxes": "x1, y1, x2, y2 in pixels of the photograph"}
                if is_detector
                else {
                    "ids": "(batch, height, width) the class of each pixel of "
                    "the photograph; -1 beyond it, where others are larger",
                    "sizes": "(batch, 2) height and width of the photographs",
                }
            ),
        }
    return {
        **told,
        "input": "RGB of 0 to 255, (1, size, size, 3). Of a photograph, scaled "
        "so that its longer side is size (bilinear, averaging where it "
        "shrinks), placed at the top left; the rest is 114",
        **(
            {
                "boxes": "x1, y1, x2, y2 in pixels of the input, to be divided "
                "by the scale: the sides in the input by those of the "
                "photograph"
            }
            if is_detector
            else {
                "ids": "(1, size, size) the class of each pixel of the input; "
                "cut off what is no photograph, then enlarge to its size by "
                "the nearest neighbour"
            }
        ),
    }


def pixels_function(model: keras.Model) -> Any:
    """Returns the function that ONNX and LiteRT files hold."""
    size = model.image_size

    def run(images: tf.Tensor) -> Any:
        found = model(images, training=False)
        if _models.is_detector(model):
            return found
        return {"ids": tf.cast(tf.argmax(found, -1), "int32")}

    if _models.is_detector(model):
        run.min_score = model.min_score  # Exports know it of a model itself.
    return tf.function(
        run,
        input_signature=[tf.TensorSpec((1, size, size, 3), "uint8", "images")],
    )


def _export_pixels(
    model: keras.Model,
    path: pathlib.Path,
    kind: str,
    photographs: Sequence[np.ndarray],
    options: Mapping[str, Any],
) -> None:
    function, sample = pixels_function(model), None
    if photographs:
        middles = (np.array(x.shape[:2]) / 2 for x in photographs)
        squares = map(
            functools.partial(_models.view, model), photographs, middles
        )
        sample = (np.uint8(np.round(square))[None] for square, _ in squares)
    if kind == "onnx":
        export.onnx(function, path, sample=sample, **options)
        _add_metadata(path, describe(model))
    else:
        export.litert(function, path, sample=sample, **options)


def _add_metadata(path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes the description into an ONNX file, as its metadata "tf_deform".

    Classes are also the metadata "names", `{0: 'cat', ...}`, where some tools
    look for them.
    """
    import onnx

    proto = onnx.load(str(path))
    names = dict(enumerate(about["classes"]))
    onnx.helper.set_model_props(
        proto, {"tf_deform": json.dumps(about), "names": str(names)}
    )
    with _files.writing(path) as partial:
        partial.write_bytes(proto.SerializeToString())


def _export_folder(
    model: keras.Model,
    path: pathlib.Path,
    portable: bool,
    photographs: Sequence[np.ndarray],
    options: Mapping[str, Any],
) -> None:
    if not photographs:
        shape = (model.image_size, model.image_size, 3)
        photographs = [
            np.random.default_rng(0).integers(0, 256, shape, "uint8")
        ]
    export.saved_model(
        models.serving(model),
        path,
        "portable" if portable else "native",
        image_bytes=False,
        sample=np.array([tf.io.encode_png(x).numpy() for x in photographs]),
        **options,
    )
