# SPDX-License-Identifier: Apache-2.0
"""Trains detectors and segmenters in the folder of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import data, models, training
from tf_deform._keras import keras
from tf_deform.tasks import _evaluate, _models, _pictures, _run, _setup

LOGGER = logging.getLogger("tf_deform")
_DETECTOR_RATE, _SEGMENTER_RATE = 0.02, 0.01
_PICTURES = 8
# Photographs on which the reach of offsets is measured after each epoch.
_MEASURED = 2


def train_detector(run: _run.Run) -> dict[str, Any]:
    """Trains a detector; see `tf_deform.tasks.train_detector`."""
    settings = run.settings
    train, val = _setup.read_parts(run)
    backbone = _setup.make_backbone(settings)
    options = {
        "image_size": settings["size"],
        "class_names": train.classes,
        "max_detections": settings["max_detections"],
        "seed": settings["seed"],
    }
    if settings["model"] == "rfcn":
        model = models.RFCN(backbone, len(train.classes), **options)
    else:
        model = models.FasterRCNN(
            backbone, len(train.classes), settings["pooling"], **options
        )
    _setup.prepare(model, settings)
    _report_objects(train, val, model, settings)

    def batches(start: int) -> tf.data.Dataset:
        return data.detection_batches(
            train,
            settings["size"],
            settings["batch_size"],
            seed=settings["seed"],
            start=start,
            tile=settings["tile"],
            flips=settings["flips"],
        )

    judge = _models.Judge(val, True, settings["max_detections"])
    return _Training(run, model, train, val, batches, judge).run()


def train_segmenter(run: _run.Run) -> dict[str, Any]:
    """Trains a segmenter; see `tf_deform.tasks.train_segmenter`."""
    settings = run.settings
    train, val = _setup.read_parts(run)
    model = models.Segmenter(
        _setup.make_backbone(settings),
        len(train.classes),
        output_stride=settings["output_stride"],
        image_size=settings["size"],
        class_names=train.classes,
    )
    _setup.prepare(model, settings)

    def batches(start: int) -> tf.data.Dataset:
        return data.segmentation_batches(
            train,
            settings["size"],
            settings["batch_size"],
            seed=settings["seed"],
            start=start,
            tile=settings["tile"],
            flips=settings["flips"],
        )

    judge = _models.Judge(val, False)
    return _Training(run, model, train, val, batches, judge).run()


def _report_objects(train: Any, val: Any, model: Any, settings: dict) -> None:
    """Logs how many objects there are of each size, and what will be missed.

    Raises:
        ValueError: There is no object to learn from.
    """
    boxes = []
    for photograph in train.photographs:
        wanted = ~(photograph.crowd | photograph.difficult)
        scale = settings["size"] / (
            settings["tile"] or max(photograph.height, photograph.width)
        )
        boxes.append(photograph.boxes[wanted] * scale)
    if not sum(map(len, boxes)):
        raise ValueError(
            f"Expected objects to learn from in {settings['data']}. Received: "
            f"{len(boxes)} photographs without any"
        )
    # Without a bound, any anchor that touches an object is one for it.
    least = max(model.min_anchor_overlap, 0.01)
    report = training.anchor_report(boxes, model.anchors(), least)
    LOGGER.info("To learn from: %s", report)
    owners = np.repeat(np.arange(len(boxes)), [len(rows) for rows in boxes])
    missed = np.unique(owners[report.overlaps < least])
    if len(missed):
        names = [train.photographs[i].path for i in missed[:5]]
        LOGGER.info(
            "Objects without an anchor are in %d photographs, such as %s",
            len(missed),
            ", ".join(map(str, names)),
        )
    most = max(len(photograph.boxes) for photograph in val.photographs)
    if not most:
        LOGGER.warning(
            "There is no object in the photographs for validation: no epoch is "
            "better than another one"
        )
    if most > settings["max_detections"]:
        LOGGER.warning(
            "A photograph for validation has %d objects, of which %d can be "
            "found: max_detections (--max-detections) sets another limit",
            most,
            settings["max_detections"],
        )


class _Training:
    """Trains a model, and writes what a run keeps.

    Args:
        run: The run.
        model: The untrained model.
        train: The photographs to learn from.
        val: The photographs for validation.
        batches: Makes endless batches from a step on.
        judge: Judges the model.
    """

    def __init__(
        self,
        run: _run.Run,
        model: keras.Model,
        train: Any,
        val: Any,
        batches: Callable[[int], tf.data.Dataset],
        judge: _models.Judge,
    ) -> None:
        self._run, self._model, self._val = run, model, val
        self._batches, self._judge = batches, judge
        settings = run.settings
        examples = data.examples_per_epoch(train, settings["tile"])
        self._epoch_steps = math.ceil(examples / settings["batch_size"])
        self._steps = settings["steps"] or (
            settings["epochs"] * self._epoch_steps
        )
        self._epochs = math.ceil(self._steps / self._epoch_steps)

    def run(self) -> dict[str, Any]:
        """Trains up to the last step, and returns what `metrics.json` says."""
        settings, folder = self._run.settings, self._run.folder
        rate = _SEGMENTER_RATE
        if _models.is_detector(self._model):
            rate = _DETECTOR_RATE
        self._model.compile(
            _setup.make_optimizer(settings, rate, self._steps),
            jit_compile=settings["jit"],
        )
        if settings["weights"] == "none":
            _setup.follow_batch_norm(self._model, self._steps)
        ema = None
        if settings["ema"] is not None:
            ema = training.EmaEvaluation(settings["ema"])
        monitor = f"val_{self._judge.monitor}"
        checkpoints = training.BestAndLast(folder, monitor, ema=ema)
        start = checkpoints.restore(self._model)
        if start:
            LOGGER.info("Going on after step %d of %d", start, self._steps)
        if start < self._steps:
            self._fit(start, checkpoints, ema)
        return self._finish(checkpoints)

    def _fit(self, start: int, checkpoints: Any, ema: Any) -> None:
        bar = _run.shows_bar()
        callbacks = [
            # It comes first, to show the losses alone.
            *([keras.callbacks.ProgbarLogger()] if bar else []),
            _Guard(start, self._steps),
            *([ema] if ema else []),
            *self._monitors(),
            # It asks the judge of a segmenter just as an evaluator of boxes.
            training.CocoCallback(self._judge, self._predict, ema=ema),
            _EpochLog(self._epochs),
            checkpoints,
            training.TensorBoardLogs(self._run.folder / "tensorboard"),
        ]
        self._model.fit(
            self._batches(start),
            initial_epoch=checkpoints.epoch,
            epochs=self._epochs,
            steps_per_epoch=self._epoch_steps,
            shuffle=False,  # The batches are shuffled already.
            callbacks=callbacks,
            verbose=1 if bar else 0,
        )

    def _predict(self, model: Any = None) -> Iterator[tuple[int, Any]]:
        """Yields what a model, by default that in training, finds."""
        return _models.predict(
            model or self._model,
            self._val.photographs,
            self._run.settings["tile"],
        )

    def _monitors(self) -> list[Any]:
        """Returns what watches the offsets, if the backbone has some."""
        if not _pictures.has_offsets(self._model):
            return []
        images = [
            np.asarray(
                data.letterbox(
                    data.read_image(photograph.path), self._model.image_size
                )[0]
            )
            for photograph in self._val.photographs[:_MEASURED]
        ]
        monitor = training.SamplingMonitor(
            np.float32(images), log_dir=self._run.folder / "tensorboard/offsets"
        )
        return [_Apart(monitor)]

    def _finish(self, checkpoints: Any) -> dict[str, Any]:
        """Judges and draws what the best model finds."""
        folder = self._run.folder
        model = _models.load(str(folder / "best.keras"))
        found = list(self._predict(model))
        measures = self._judge.evaluate(found)
        evaluator = self._judge.evaluator
        if evaluator is not None:
            # With these files, other programs compute the same numbers.
            results = evaluator.results(found)
            training.write_metrics(folder / "results.json", results)
            training.write_metrics(folder / "truth.json", evaluator.coco)
        self._draw(model, found)
        metrics = {
            "validation": measures,
            "best": checkpoints.best,
            "epochs": checkpoints.history,
        }
        training.write_metrics(folder / "metrics.json", metrics)
        LOGGER.info(
            "Validation with the best epoch's model:\n%s",
            _run.table(measures.items()),
        )
        LOGGER.info("Done: %s", folder / "best.keras")
        return metrics

    def _draw(self, model: keras.Model, found: list[tuple[int, Any]]) -> None:
        """Draws truth beside predictions, and where the model looks."""
        folder = self._run.folder / "pictures"
        folder.mkdir(exist_ok=True)
        classes = _models.class_names(model)
        for number, objects in found[:_PICTURES]:
            photograph = self._val.photographs[number - 1]
            image = data.read_image(photograph.path)
            if _models.is_detector(model):
                pictures = [
                    _pictures.boxes_picture(image, boxes, classes, 0.3)
                    for boxes in (_pictures.truth_of(photograph), objects)
                ]
            else:
                truth = data.read_mask(photograph.mask)[..., 0]
                pictures = [
                    _pictures.mask_picture(image, ids)
                    for ids in (truth, objects)
                ]
            _pictures.write_picture(
                folder / f"validation-{number}.png",
                _pictures.side_by_side(*pictures),
            )
            if number == 1:
                _evaluate.draw_sampling(
                    folder / "sampling.png", model, image, objects
                )


class _Guard(keras.callbacks.Callback):
    """Ends training at the last step, or at a loss that is no number."""

    def __init__(self, start: int, steps: int) -> None:
        super().__init__()
        self._step, self._steps = start, steps

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._step += 1
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"Expected a finite loss. Received: {loss} at step "
                f"{self._step}. Choose a smaller `lr`, or look for broken "
                "annotations; the files of earlier epochs stay"
            )
        if self._step >= self._steps:
            self.model.stop_training = True


class _EpochLog(keras.callbacks.Callback):
    """Writes a line to the log after each epoch."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._epochs = epochs

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        numbers = ", ".join(
            f"{name} {float(value):.4g}"
            for name, value in (logs or {}).items()
            if "/" not in name and name != "val_max_detections"
        )
        LOGGER.info(
            "Epoch %d of %d, %.0f s: %s",
            epoch + 1,
            self._epochs,
            time.perf_counter() - self._begin,
            numbers,
        )


class _Apart(keras.callbacks.Callback):
    """Keeps the logs of a callback apart, and writes its warnings to the log.

    Args:
        callback: What is called at the end of epochs and of training.
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        self._callback = callback

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params(params)
        self._callback.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._callback.on_train_begin({})

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        with _logged_warnings():
            self._callback.on_epoch_end(epoch, {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        with _logged_warnings():
            self._callback.on_train_end({})


@contextlib.contextmanager
def _logged_warnings() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", RuntimeWarning)
        yield
    for warning in found:
        LOGGER.warning("%s", warning.message)
