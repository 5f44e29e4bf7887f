# SPDX-License-Identifier: Apache-2.0
"""Judges detections as COCO does: average precision, whole and of each class.

faster-coco-eval computes; this file gives it ground truth that it understands,
and reads its results by name. Its own summary, like pycocotools', takes the
third number of detections for "the" number and confuses annotations whose ids
start at 0.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tf_deform._files import to_path
from tf_deform._keras import keras
from tf_deform.ops._arguments import positive
from tf_deform.training._ema import EmaEvaluation

_log = logging.getLogger("tf_deform")
# How annotations say that an object is neither to be found nor a mistake.
_NOT_JUDGED = ("iscrowd", "ignore", "difficult")
_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def _import_library() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError(
            "Expected faster-coco-eval, which judges detections. Received: "
            f'{error}. Run `pip install "tf-deform[train]"`'
        ) from error
    return faster_coco_eval


class CocoEvaluator:
    """Computes COCO's average precision of detections.

        AP = mean of the precision at recalls 0, 0.01, ..., 1,

    over the classes and the overlaps 0.5, 0.55, ..., 0.95 from which a box
    counts as found. Source: Lin et al. 2014, "Microsoft COCO: Common Objects in
    Context", arXiv:1405.0312, and the code that goes with it.

    The ground truth is put in order first, as each of these falsifies numbers
    without a word: annotations are numbered anew from 1; image and category ids
    are too, unless all are integers; objects that are a crowd, difficult or to
    be ignored count neither for nor against; a missing or empty `area` becomes
    that of the box; and annotations whose box has no area are left out.

        evaluator = tf_deform.training.CocoEvaluator("val.json")
        metrics = evaluator.evaluate(
            (image_id, model.predict_image(image)) for image_id, image in images
        )

    Args:
        coco: The ground truth in COCO's format, or the path of its JSON file.
            Label k is the k-th category in the order of their ids, if these are
            integers, and else in the order of the list.
        max_detections: The number of detections of each image and class, those
            with the highest scores, that count. COCO's is 100: choose more
            where an image may hold more objects, and name it with the numbers.

    Attributes:
        coco: The ground truth as it is judged: with `results`, it gives the
            same numbers in other programs.
        classes: The names of the classes, in the order of labels.
        notes: What was changed in the ground truth, also logged as warnings.

    Raises:
        ImportError: faster-coco-eval is not installed.
        OSError: The file cannot be read.
        TypeError: An argument has another type.
        ValueError: The ground truth has no categories, ids or names occur
            twice, an annotation is of no image or category, or
            `max_detections` is below 1.
    """

    def __init__(
        self,
        coco: Mapping[str, Any] | str | os.PathLike,
        max_detections: int = 100,
    ) -> None:
        self._library = _import_library()
        self.max_detections = positive(max_detections, "max_detections")
        content, self._source = _read(coco)
        images = _list(content, "images", self._source)
        categories = _list(content, "categories", self._source)
        if not categories:
            raise ValueError(
                f"Expected categories in {self._source}. Received: none"
            )
        if all(_is_integer(item.get("id")) for item in categories):
            categories = sorted(categories, key=lambda item: item["id"])
        self._images = _numbers(images, "image", self._source)
        self._categories = _numbers(categories, "category", self._source)
        self.classes = tuple(
            str(item.get("name", item["id"])) for item in categories
        )
        twice = _repeated(self.classes)
        if twice:
            raise ValueError(
                f"Expected the categories in {self._source} to have names of "
                f"their own. Received: {twice} more than once"
            )
        annotations, self.notes = self._annotations(
            _list(content, "annotations", self._source)
        )
        for note in self.notes:
            _log.warning("%s: %s", self._source, note)
        self.coco = {
            "images": [
                {**item, "id": self._images[_key(item["id"])]}
                for item in images
            ],
            "categories": [
                {**item, "id": number, "name": name}
                for item, number, name in zip(
                    categories, self._categories.values(), self.classes
                )
            ],
            "annotations": annotations,
        }

    def _annotations(
        self, found: list[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Returns annotations that are judged rightly, and what was changed."""
        kept, without_area, without_box = [], 0, []
        for item in found:
            box = _box(item.get("bbox"))
            if box is None:
                without_box.append(item.get("id"))
                continue
            area = item.get("area")
            if not (_is_number(area) and area > 0):
                area = box[2] * box[3]
                without_area += 1
            kept.append(
                {
                    "id": len(kept) + 1,
                    "image_id": self._number(item, "image", self._images),
                    "category_id": self._number(
                        item, "category", self._categories
                    ),
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(
                        any(map(_is_set, map(item.get, _NOT_JUDGED)))
                    ),
                }
            )
        notes = []
        if without_box:
            notes.append(
                "left out, as their box is missing or has no area: "
                f"{len(without_box)} annotations, with the ids "
                f"{_few(without_box)}"
            )
        if without_area:
            notes.append(
                "given the area of their box, as `area`, which tells what is "
                f"small, is missing: {without_area} annotations"
            )
        return kept, tuple(notes)

    def _number(
        self, item: Mapping[str, Any], kind: str, numbers: Mapping[str, int]
    ) -> int:
        number = numbers.get(_key(item.get(f"{kind}_id")))
        if number is None:
            raise ValueError(
                f"Expected the {kind}_id of each annotation in {self._source} "
                f"to be the id of one. Received: annotation {item.get('id')!r} "
                f"with {kind}_id {item.get(f'{kind}_id')!r}"
            )
        return number

    def evaluate(
        self, found: Iterable[tuple[Any, Mapping[str, Any]]]
    ) -> dict[str, float]:
        """Judges detections.

        Args:
            found: Pairs: the id of an image, as in the given ground truth, and
                what was found in it: "boxes", `(n, 4)`, x1, y1, x2, y2 in
                pixels of the image; "scores", `(n,)`; "labels", `(n,)`,
                integers, counted from 0, of which -1 is padding. In an image
                that is not among them nothing was found.

        Returns:
            "AP"; "AP50" and "AP75" at the overlaps 0.5 and 0.75; "APs", "APm"
            and "APl" of objects below 32 x 32, below 96 x 96, and of more
            pixels; "AP/<class>" of each class; and "max_detections". A number
            of which the ground truth has no object is NaN, and counts in no
            mean.

        Raises:
            ValueError: An image is unknown or comes twice, or what was found in
                it has other shapes, is not finite, or has labels of no class.
        """
        return self.measure(self.results(found))

    def results(
        self, found: Iterable[tuple[Any, Mapping[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Returns detections in COCO's format for results, as for a file.

        The ids are those of the attribute `coco`.

        Args:
            found: As in `evaluate`.

        Raises:
            ValueError: As in `evaluate`.
        """
        results, seen = [], set()
        numbers = list(self._categories.values())
        for image_id, objects in found:
            image = self._images.get(_key(image_id))
            if image is None or image in seen:
                raise ValueError(
                    "Expected each image of the ground truth at most once. "
                    f"Received: the image {image_id!r}"
                    + (" again" if image in seen else ", which is not in it")
                )
            seen.add(image)
            boxes, scores, labels = self._arrays(image_id, objects)
            boxes[:, 2:] -= boxes[:, :2]
            results += [
                {
                    "image_id": image,
                    "category_id": numbers[label],
                    "bbox": box,
                    "score": score,
                }
                for box, score, label in zip(
                    boxes.tolist(), scores.tolist(), labels.tolist()
                )
            ]
        return results

    def _arrays(
        self, image_id: Any, objects: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns boxes, scores and labels, without padding."""
        boxes = np.array(objects["boxes"], np.float64)
        scores = np.array(objects["scores"], np.float64)
        labels = np.array(objects["labels"])
        if not labels.size:
            labels = labels.astype(int)
        if (
            boxes.shape not in ((*labels.shape, 4), (0,))
            or scores.shape != labels.shape
            or labels.ndim != 1
            or labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                "Expected boxes (n, 4), scores (n,) and integer labels (n,). "
                f"Received: {boxes.shape}, {scores.shape} and {labels.dtype} "
                f"{labels.shape} for the image {image_id!r}"
            )
        valid = labels != -1
        boxes = boxes.reshape(-1, 4)[valid]
        scores, labels = scores[valid], labels[valid]
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(
                "Expected finite boxes and scores. Received: NaN or infinity "
                f"for the image {image_id!r}"
            )
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if wrong.size:
            raise ValueError(
                f"Expected labels below {len(self.classes)}, the number of "
                f"classes, or -1. Received: {wrong[0]} for the image "
                f"{image_id!r}"
            )
        return boxes, scores, labels

    def measure(self, results: list[Mapping[str, Any]]) -> dict[str, float]:
        """Judges what `results` returned, and returns what `evaluate` does."""
        truth = self._library.COCO(copy.deepcopy(self.coco))
        # The library writes into what it judges. Its release 1.7 loads no empty
        # list of results.
        found = (
            truth.loadRes([dict(item) for item in results])
            if results
            else self._library.COCO({**truth.dataset, "annotations": []})
        )
        judge = self._library.COCOeval_faster(truth, found, "bbox")
        judge.params.maxDets = [self.max_detections]
        judge.evaluate()
        judge.accumulate()
        return self._summary(judge)

    def _summary(self, judge: Any) -> dict[str, float]:
        params = judge.params
        # (overlaps, recalls, classes, areas, numbers of detections)
        precision = judge.eval["precision"]
        catalog = list(params.catIds)  # sorted, as labels need not be
        classes = [
            catalog.index(number) for number in self._categories.values()
        ]

        def mean(
            overlap: float | None = None,
            area: str = "all",
            labels: slice = slice(None),
        ) -> float:
            part = precision[..., params.areaRngLbl.index(area), :]
            part = part[..., params.maxDets.index(self.max_detections)]
            part = part[:, :, classes[labels]]
            if overlap is not None:
                part = part[np.isclose(params.iouThrs, overlap)]
            part = part[part > -1]  # -1 stands for no objects
            return float(part.mean()) if part.size else math.nan

        return {
            "AP": mean(),
            "AP50": mean(0.5),
            "AP75": mean(0.75),
            **{key: mean(area=area) for key, area in _SIZES.items()},
            **{
                f"AP/{name}": mean(labels=slice(label, label + 1))
                for label, name in enumerate(self.classes)
            },
            "max_detections": self.max_detections,
        }


class CocoCallback(keras.callbacks.Callback):
    """Judges detections after epochs, and puts the numbers into the logs.

    The logs are those of `CocoEvaluator.evaluate`, named "val_AP" and so on.
    Callbacks that come later in the list that `fit` is given see them, and so
    do `History` and the progress bar: put it before `BestAndLast`.

    Args:
        evaluator: A `CocoEvaluator`.
        predict: A function without arguments that detects objects with the
            model as it is now, and returns what `evaluator.evaluate` takes.
        frequency: The number of epochs of which the last one is judged; and
            the last epoch of all is.
        ema: The `EmaEvaluation` whose averages are judged, or None.

    Raises:
        TypeError: An argument has another type.
        ValueError: `frequency` is below 1.
    """

    def __init__(
        self,
        evaluator: CocoEvaluator,
        predict: Callable[[], Iterable[tuple[Any, Mapping[str, Any]]]],
        frequency: int = 1,
        ema: EmaEvaluation | None = None,
    ) -> None:
        super().__init__()
        if not callable(predict):
            raise TypeError(
                f"Expected `predict` to be a function. Received: {predict!r}"
            )
        self._evaluator = evaluator
        self._predict = predict
        self._frequency = positive(frequency, "frequency")
        self._ema = ema

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        last = epoch + 1 == (self.params or {}).get("epochs")
        if (epoch + 1) % self._frequency and not last:
            return
        averages = self._ema.averages() if self._ema else None
        with averages or contextlib.nullcontext():
            metrics = self._evaluator.evaluate(self._predict())
        if logs is not None:
            logs.update(
                {f"val_{name}": value for name, value in metrics.items()}
            )


def _read(coco: Any) -> tuple[Mapping[str, Any], str]:
    """Returns the content of a file, and what it is called in messages."""
    if isinstance(coco, Mapping):
        return coco, "the ground truth"
    path = to_path(coco)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"Expected {path} to be a JSON file. Received: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected {path} to hold images, annotations and categories. "
            f"Received: a {type(content).__name__}"
        )
    return content, str(path)


def _list(content: Mapping[str, Any], key: str, source: str) -> list[Any]:
    found = content.get(key, [])
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(item, Mapping) for item in found
    ):
        raise ValueError(
            f"Expected `{key}` in {source} to be a list of objects. Received: "
            f"{found!r:.100}"
        )
    return list(found)


def _numbers(
    items: list[Mapping[str, Any]], kind: str, source: str
) -> dict[str, int]:
    """Returns the number by which each id is judged."""
    keys = [_key(item.get("id")) for item in items]
    if "None" in keys:
        raise ValueError(
            f"Expected each {kind} in {source} to have an id. Received: "
            f"{items[keys.index('None')]!r:.200}"
        )
    twice = _repeated(keys)
    if twice:
        raise ValueError(
            f"Expected each {kind} in {source} to have an id of its own. "
            f"Received: {twice} more than once"
        )
    if all(_is_integer(item["id"]) for item in items):
        return {key: int(item["id"]) for key, item in zip(keys, items)}
    return {key: number for number, key in enumerate(keys, start=1)}


def _key(value: Any) -> str:
    """Returns an id as text: some tools write one id as 7, "7" and 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _repeated(values: Iterable[str]) -> str:
    """Returns the values that occur more than once, as text."""
    seen: set[str] = set()
    twice = [value for value in values if value in seen or seen.add(value)]
    return _few(twice)


def _few(values: list[Any]) -> str:
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(repr, values[:5])) + more


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float, np.number))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _is_set(flag: Any) -> bool:
    """Tells whether a flag is set, which some tools write as a text."""
    return flag not in (None, 0, "", "0")


def _box(value: Any) -> list[float] | None:
    """Returns x, y, width and height, or None if that is no box."""
    try:
        box = [float(number) for number in value]
    except (TypeError, ValueError):
        return None
    if len(box) != 4 or not all(map(math.isfinite, box)):
        return None
    return box if box[2] > 0 and box[3] > 0 else None
