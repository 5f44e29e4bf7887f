# SPDX-License-Identifier: Apache-2.0
"""Trains detectors and segmenters in the folder of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import data, models, training
from tf_deform._keras import keras
from tf_deform.tasks import _evaluate, _models, _pictures, _run, _setup

LOGGER = logging.getLogger("tf_deform")
_DETECTOR_RATE, _SEGMENTER_RATE = 0.02, 0.01
# Objects of which a tile shows less than this share are not learned there.
_LEAST_VISIBLE = 0.4
# Photographs on which the reach of offsets is measured at each validation.
_MEASURED = 2
# Sides of an object, the longer one by the other: no anchor of any size fits
# longer ones, as the anchors' own are as 2 to 1 at most.
_LONGEST = 8
_SILENCE = 60  # seconds after which the log says how far a run is


def train_detector(run: _run.Run) -> dict[str, Any]:
    """Trains a detector; see `tf_deform.tasks.train_detector`."""
    settings = run.settings
    train, val = _setup.read_parts(run)
    # It needs an extra, and tells so before weights are fetched.
    judge = _models.Judge(val, True, settings["max_detections"])
    backbone = _setup.make_backbone(settings)
    options = {
        "image_size": settings["size"],
        "class_names": train.classes,
        "seed": settings["seed"],
        "tile": settings["tile"],
    }
    if settings["anchor_scales"] is not None:
        options["anchor_scales"] = settings["anchor_scales"]
    is_rfcn = settings["model"] == "rfcn"
    if (channels := settings["channels"]) is not None:
        options |= (
            {"rpn_channels": 2 * channels, "channels": 4 * channels}
            if is_rfcn
            else {"fpn_channels": channels, "head_units": 4 * channels}
        )
    if is_rfcn:
        model = models.RFCN(backbone, len(train.classes), **options)
    else:
        model = models.FasterRCNN(
            backbone, len(train.classes), settings["pooling"], **options
        )
    _models.set_max_detections(model, settings["max_detections"])
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
            min_visible=_LEAST_VISIBLE,
        )

    return _Training(run, model, train, val, batches, judge).run()


def train_segmenter(run: _run.Run) -> dict[str, Any]:
    """Trains a segmenter; see `tf_deform.tasks.train_segmenter`."""
    settings = run.settings
    train, val = _setup.read_parts(run)
    channels = settings["channels"]
    model = models.Segmenter(
        _setup.make_backbone(settings),
        len(train.classes),
        output_stride=settings["output_stride"],
        **({} if channels is None else {"filters": 4 * channels}),
        image_size=settings["size"],
        class_names=train.classes,
        tile=settings["tile"],
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
    boxes, size = [], settings["size"]
    for photograph in train.photographs:
        wanted = ~(photograph.crowd | photograph.difficult)
        side = settings["tile"] or max(photograph.height, photograph.width)
        scaled = photograph.boxes[wanted] * (size / side)
        boxes.append(scaled)
    if not sum(map(len, boxes)):
        raise ValueError(
            f"Expected objects to learn from in {settings['data']}. Received: "
            f"{len(boxes)} photographs without any"
        )
    _report_cut(boxes, settings)
    # Without a bound, any anchor that touches an object is one for it.
    least = max(model.min_anchor_overlap, 0.01)
    if settings["tile"]:
        boxes = [_in_a_tile(rows, size) for rows in boxes]
    report = training.anchor_report(boxes, model.anchors(), least)
    LOGGER.info(
        "To learn from, in pixels of the model's %d x %d: %s",
        size,
        size,
        report,
    )
    owners = np.repeat(np.arange(len(boxes)), [len(rows) for rows in boxes])
    missed = np.unique(owners[report.overlaps < least])
    if len(missed):
        names = [train.photographs[i].path for i in missed[:5]]
        LOGGER.info(
            "Objects without an anchor are in %d photographs, such as %s%s",
            len(missed),
            ", ".join(map(str, names)),
            _advise(report.boxes[report.overlaps < least], model, settings),
        )
    most = max(len(photograph.boxes) for photograph in val.photographs)
    if not most:
        LOGGER.warning(
            "There is no object in the photographs for validation: no model is "
            "better than another one, and best.keras is the last one"
        )
    if most > settings["max_detections"]:
        LOGGER.warning(
            "A photograph for validation has %d objects, of which %d can be "
            "found: max_detections (--max-detections) sets another limit",
            most,
            settings["max_detections"],
        )


def _report_cut(boxes: Sequence[np.ndarray], settings: dict) -> None:
    """Logs how many objects are too large for tiles to show them."""
    sides = np.concatenate([rows[:, 2:] - rows[:, :2] for rows in boxes])
    shown = np.prod(np.minimum(sides, settings["size"]), axis=1)
    count = int(np.sum(shown < _LEAST_VISIBLE * np.prod(sides, axis=1)))
    if count:
        LOGGER.warning(
            "Of %d objects a tile shows less than %.0f %%, and they are not "
            "learned: choose a larger `tile` (--tile)",
            count,
            100 * _LEAST_VISIBLE,
        )


def _in_a_tile(boxes: np.ndarray, size: int) -> np.ndarray:
    """Moves boxes to where a tile shows them whole, if one is large enough.

    Anchors meet a box there as in the tiles of training, whose distances to the
    photograph's corner are of all kinds: a box keeps its place among the cells
    of maps, as it is moved by multiples of their strides.

    Args:
        boxes: `(n, 4)` in pixels of the model, of the whole photograph.
        size: Height and width of a tile in these pixels.
    """
    stride = 2 ** max(0, int(math.log2(size / 8)))
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    shift = np.round((middle - size / 2) / stride) * stride
    return np.clip(boxes - np.tile(shift, 2), 0, size)


def _advise(boxes: np.ndarray, model: Any, settings: dict) -> str:
    """Says what would give objects, as the model sees them, an anchor."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    areas = np.prod(model.anchors()[:, 2:] - model.anchors()[:, :2], axis=1)
    fits = np.maximum(width, height) <= _LONGEST * np.minimum(width, height)
    now = ", ".join(f"{scale:g}" for scale in model.anchor_scales)
    advice = ""
    if np.any(fits & (width * height < areas.min())):
        tile = "a smaller --tile" if settings["tile"] else "--tile"
        advice += (
            f". For small ones, choose smaller --anchor-scales (now {now}), a "
            f"larger --size or {tile}"
        )
    if np.any(fits & (width * height > areas.max())):
        advice += f". For large ones, add larger --anchor-scales (now {now})"
    return advice


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
        self._pass_steps = math.ceil(examples / settings["batch_size"])
        self._steps = settings["steps"] or (
            settings["epochs"] * self._pass_steps
        )
        # Keras validates and saves after what it calls an epoch.
        self._epoch_steps = settings["val_every"] or self._pass_steps

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
        if start >= self._steps:
            LOGGER.info(
                "All %d steps are done: the run is judged once more. It goes "
                "on for longer with more `steps` or `epochs` than it had "
                "(--steps, --epochs)",
                start,
            )
        else:
            if start:
                LOGGER.info("Going on after step %d of %d", start, self._steps)
            elif settings["resume"]:
                LOGGER.info("Nothing was saved yet: the run begins anew")
            self._fit(start, checkpoints, ema)
        return self._finish(checkpoints)

    def _fit(self, start: int, checkpoints: Any, ema: Any) -> None:
        bar = _run.shows_bar()
        callbacks = [
            # It comes first, to show the losses alone.
            *([_Bar()] if bar else []),
            _Guard(start, self._steps),
            *([ema] if ema else []),
            *self._monitors(),
            # It asks the judge of a segmenter just as an evaluator of boxes.
            training.CocoCallback(self._judge, self._predict, ema=ema),
            _StepLog(start, self._steps, self._pass_steps, quiet=bar),
            checkpoints,
            training.TensorBoardLogs(self._run.folder / "tensorboard"),
        ]
        LOGGER.info("Training: the first step takes longer, as it compiles")
        self._model.fit(
            self._batches(start),
            initial_epoch=checkpoints.epoch,
            # A run that was to end here may have ended within an epoch.
            epochs=checkpoints.epoch
            + math.ceil((self._steps - start) / self._epoch_steps),
            steps_per_epoch=self._epoch_steps,
            shuffle=False,  # The batches are shuffled already.
            callbacks=callbacks,
            verbose=1 if bar else 0,
        )

    def _predict(self, model: Any = None) -> Iterator[tuple[int, Any]]:
        """Yields what a model, by default that in training, finds."""
        return models.predictions(model or self._model, self._val.photographs)

    def _monitors(self) -> list[Any]:
        """Returns what watches the offsets, if the backbone has some."""
        if not _pictures.has_offsets(self._model):
            return []
        images = [
            _models.view(self._model, image, np.array(image.shape[:2]) / 2)[0]
            for image in (
                data.read_image(photograph.path)
                for photograph in self._val.photographs[:_MEASURED]
            )
        ]
        monitor = training.SamplingMonitor(
            np.stack(images), log_dir=self._run.folder / "tensorboard/offsets"
        )
        return [_Apart(monitor)]

    def _finish(self, checkpoints: Any) -> dict[str, Any]:
        """Judges and draws what the best model finds."""
        folder = self._run.folder
        model = _models.load(str(folder / "best.keras"))
        drawn: list[tuple[int, Any]] = []
        found = self._predict(model)
        found = _models.first(found, _evaluate.MOST_PICTURES, drawn)
        evaluator = self._judge.evaluator
        if evaluator is not None:
            found = list(found)
        measures = self._judge.evaluate(found)
        if evaluator is not None:
            # With these files, other programs compute the same numbers.
            results = evaluator.results(found)
            training.write_metrics(folder / "results.json", results)
            training.write_metrics(folder / "truth.json", evaluator.coco)
        self._draw(model, drawn)
        metrics = {
            "validation": measures,
            "best": self._told(checkpoints.best),
            "history": [self._told(logs) for logs in checkpoints.history],
        }
        training.write_metrics(folder / "metrics.json", metrics)
        LOGGER.info(
            "Validation of best.keras, the model after step %d:\n%s",
            checkpoints.best["step"],
            _run.table(measures),
        )
        LOGGER.info("Done: %s", folder / "best.keras")
        return metrics

    def _told(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Returns logs whose "epoch" is the number of passes so far."""
        return logs | {"epoch": round(logs["step"] / self._pass_steps, 4)}

    def _draw(self, model: keras.Model, found: list[tuple[int, Any]]) -> None:
        """Draws truth beside predictions, and where the model looks."""
        folder = self._run.folder / "pictures"
        photographs = self._val.photographs
        _evaluate.draw_comparisons(folder, model, photographs, found)
        image = data.read_image(photographs[0].path)
        _evaluate.draw_sampling(
            folder / "sampling.png", model, image, found[0][1]
        )


class _Bar(keras.callbacks.ProgbarLogger):
    """Shows progress; what Keras calls epochs need not be passes."""

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params({**params, "epochs": 1})


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
                "annotations; the files of the last validation stay"
            )
        if self._step >= self._steps:
            self.model.stop_training = True


class _StepLog(keras.callbacks.Callback):
    """Writes a line to the log after each validation, and each minute.

    Args:
        start: The number of steps that are done.
        steps: The number of steps of the run.
        pass_steps: The number of steps of a pass over the photographs.
        quiet: Whether to leave out the lines of each minute, as a bar shows
            what they say.
    """

    def __init__(
        self, start: int, steps: int, pass_steps: int, quiet: bool = False
    ) -> None:
        super().__init__()
        self._start, self._step = start, start
        self._steps, self._pass_steps = steps, pass_steps
        self._quiet = quiet

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._begin = self._timed_from = time.perf_counter()
        self._said = self._begin
        self._timed = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self._timed == 1 and self._step == self._start + 1:
            # TensorFlow has compiled in the first step, which does not count.
            self._timed_from, self._timed = self._timed_to, 0
        self._step += 1
        self._timed += 1
        self._timed_to = time.perf_counter()
        if self._step == self._start + 1:
            self._said = self._timed_to
        elif not self._quiet and self._timed_to - self._said >= _SILENCE:
            self._said = self._timed_to
            seconds = self._seconds()
            left = seconds * (self._steps - self._step)
            LOGGER.info(
                "Step %d of %d, %.3g s a step: %s to go, without validation",
                self._step,
                self._steps,
                seconds,
                f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} s",
            )

    def _seconds(self) -> float:
        """Returns the seconds of a step since the last validation."""
        return (self._timed_to - self._timed_from) / self._timed

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        numbers = ", ".join(
            f"{name} {_run.number_text(value)}"
            for name, value in (logs or {}).items()
            if "/" not in name and name != "val_max_detections"
        )
        LOGGER.info(
            "Step %d of %d, epoch %.3g of %.3g, %.3g s a step, %.0f s with "
            "validation: %s",
            self._step,
            self._steps,
            self._step / self._pass_steps,
            self._steps / self._pass_steps,
            self._seconds(),
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
