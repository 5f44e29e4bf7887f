# SPDX-License-Identifier: Apache-2.0
"""Learns to segment and to detect digits, and compares plain and deformable."""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import data, training, visualization
from tf_deform._files import writing
from tf_deform._keras import keras
from tf_deform.demo import _compare, _digit_pictures, _digit_scenes
from tf_deform.demo._digit_models import (
    DETECTORS,
    SEGMENTERS,
    build_detector,
    build_segmenter,
)
from tf_deform.demo._digit_scenes import IMAGE_SIZE
from tf_deform.models import deformable_layers

_LOG = logging.getLogger("tf_deform")

# What is trained without the controls.
_FEW = {"segment": ("plain", "dcn-v2"), "detect": ("plain", "both")}
# What the arms are compared by, and what else is measured.
_IOU, _AP = ("mIoU",), ("AP", "AP50", "AP75")
STEPS = 800
_EPOCHS, _BATCH = 8, 32
_RATE, _WARM_UP, _OFFSET_MULTIPLIER = 0.016, 50, 0.2
# Nine of ten pixels are background: at full weight it would outweigh digits.
_BACKGROUND_WEIGHT = 0.5
_MEASURED = 300  # scenes whose digits' sizes are compared with the dilation


def digits(
    out: str | os.PathLike,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    controls: bool = False,
) -> dict[str, Any]:
    """Compares segmenters and detectors of digits, plain and deformable.

    The scenes are composed of scans that scikit-learn contains, on pictures
    that scikit-image contains: nothing is fetched. All arms of a task have the
    same structure and see the same batches; what they do with the last two of
    five convolutions differs.

    In the folder it leaves

        metrics.json      every number that is logged
        predictions.png   the classes that segmenters see, beside the truth
        sampling.png      where their last two convolutions look
        detections.png    what detectors find, beside the truth
        parts.png         how the pooling moves the bins of regions
        scenes/           the scenes, with masks and boxes
        runs/             a folder for each task, arm and seed, with the model

    The pictures are of the plain and of the most deformable model, with the
    first seed. How the dilation of the latter's convolutions follows the sizes
    of digits is in the metrics, as Spearman's correlation.

    A call that was interrupted goes on when it is repeated.

    Args:
        out: Folder for results.
        seeds: Seeds of the initial weights and of the order of scenes.
        steps: Number of training steps, a multiple of 8.
        controls: Whether to train also the plain arms with more filters, with
            another layer and with dilation, and the arms between plain and most
            deformable.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: `out` holds a run with other settings, or an argument is
            wrong.
    """
    if steps < _EPOCHS or steps % _EPOCHS:
        raise ValueError(
            f"Expected `steps` to be a multiple of {_EPOCHS}. Received: {steps}"
        )
    out = pathlib.Path(out)
    scenes = _digit_scenes.write(out / "scenes")
    metrics: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0))}
    tasks = (
        _Task("segment", scenes, build_segmenter, _IOU, list(SEGMENTERS)),
        _Task("detect", scenes, build_detector, _AP, list(DETECTORS)),
    )
    for task in tasks:
        arms = task.arms if controls else _FEW[task.name]
        results = [
            task.run(out / "runs", arm, seed, steps)
            for arm in arms
            for seed in sorted(set(seeds))
        ]
        compared = _compare.differences(
            results, lambda r, m=task.metric: r[m], task.pairs()
        )
        metrics[task.name] = {"results": results, "differences": compared}
        columns = {name: lambda r, m=name: r[m] for name in task.measures}
        lines = [_compare.table(results, columns), ""]
        lines += [_compare.sentence(pair, task.metric) for pair in compared]
        _LOG.info("\n%s", "\n".join(lines))
        seed = min(seeds)
        shown = {
            arm: task.load(out / "runs", arm, seed)
            for arm in dict.fromkeys((arms[0], arms[-1]))
        }
        _digit_pictures.draw(out, task.name, shown, scenes / "test")
        if task.name == "segment":
            followed = follow_sizes(shown[arms[-1]], scenes / "test")
            metrics[task.name]["follows_sizes"] = followed
            _LOG.info("Dilation follows the sizes of digits: %s", followed)
    training.write_metrics(out / "metrics.json", metrics)
    _LOG.info("Written to %s", out)
    return metrics


class _Task:
    """Trains and tests the arms of a task, each run in a folder of its own.

    Args:
        name: "segment" or "detect".
        scenes: Folder of the scenes.
        build: Makes the untrained model of an arm and a seed.
        measures: What is measured; the arms are compared by the first.
        arms: All arms, the plain ones first.
    """

    def __init__(
        self,
        name: str,
        scenes: pathlib.Path,
        build: Callable[[str, int], keras.Model],
        measures: tuple[str, ...],
        arms: list[str],
    ) -> None:
        self.name, self.measures, self.arms = name, measures, arms
        self.metric = measures[0]
        self._scenes, self._build = scenes, build

    def pairs(self) -> list[tuple[str, str]]:
        """Returns pairs of every deformable arm with all arms before it."""
        return [
            (arm, base)
            for base, arm in itertools.combinations(self.arms, 2)
            if not arm.startswith("plain")
        ]

    def run(
        self, parent: pathlib.Path, arm: str, seed: int, steps: int
    ) -> dict[str, Any]:
        folder = self._folder(parent, arm, seed)
        settings = {"arm": arm, "seed": seed, "steps": steps}
        result = _compare.run_once(
            folder, settings, lambda: self._run(folder, **settings)
        )
        (folder / "last.keras").unlink(missing_ok=True)
        return result

    def load(self, parent: pathlib.Path, arm: str, seed: int) -> keras.Model:
        path = self._folder(parent, arm, seed) / "model.keras"
        return keras.saving.load_model(path, compile=False)

    def _folder(
        self, parent: pathlib.Path, arm: str, seed: int
    ) -> pathlib.Path:
        return parent / f"{self.name}-{arm}-seed{seed}"

    def _run(
        self, folder: pathlib.Path, arm: str, seed: int, steps: int
    ) -> dict[str, Any]:
        model = self._build(arm, seed)
        model.compile(optimizer=make_optimizer(steps), jit_compile=False)
        checkpoints = training.BestAndLast(folder, None)
        start = checkpoints.restore(model)
        _LOG.info(
            "%s, %s, seed %d: from step %d to %d",
            self.name,
            arm,
            seed,
            start,
            steps,
        )
        if start < steps:
            line = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: _LOG.info(
                    "  epoch %d, %.0f s: loss %.3f",
                    epoch + 1,
                    logs["seconds"],
                    logs["loss"],
                )
            )
            model.fit(
                self._batches(seed, start),
                initial_epoch=checkpoints.epoch,
                epochs=_EPOCHS,
                steps_per_epoch=steps // _EPOCHS,
                shuffle=False,  # The batches are shuffled already.
                callbacks=[_compare.Timer(), line, checkpoints],
                verbose=0,
            )
        with writing(folder / "model.keras") as partial:
            model.save(partial)
        seconds = [record["seconds"] for record in checkpoints.history]
        return {
            "parameters": sum(
                int(np.prod(variable.shape))
                for variable in model.trainable_variables
            ),
            "ms_per_step": 1000 * float(np.median(seconds)) * _EPOCHS / steps,
            **self._measure(model),
        }

    def _batches(self, seed: int, start: int) -> tf.data.Dataset:
        train = _digit_scenes.read(self._scenes / "train", self.name)
        options = {"augment": False, "seed": seed, "start": start}
        if self.name == "detect":
            return data.detection_batches(train, IMAGE_SIZE, _BATCH, **options)
        batches = data.segmentation_batches(
            train, IMAGE_SIZE, _BATCH, **options
        )
        return batches.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)

    def _measure(self, model: keras.Model) -> dict[str, float]:
        held_out = _digit_scenes.read(self._scenes / "test", self.name)
        if self.name == "detect":
            judge = training.CocoEvaluator(held_out.to_coco())
            measured = judge.evaluate(self._find(model, held_out))
            return {name: measured[name] for name in self.measures}
        metric = training.MeanIoU(_digit_scenes.NUM_CLASSES)
        for photographs in _chunks(held_out.photographs):
            images = np.stack([data.read_image(p.path) for p in photographs])
            masks = np.stack([data.read_mask(p.mask) for p in photographs])
            logits = model.predict_on_batch(images.astype("float32"))
            metric.update_state(masks, logits.argmax(-1)[..., None])
        return {"mIoU": float(metric.result())}

    def _find(
        self, model: keras.Model, held_out: Any
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        number = 0
        for photographs in _chunks(held_out.photographs):
            images = np.stack([data.read_image(p.path) for p in photographs])
            found = model.detect(images)
            for row in range(len(photographs)):
                number += 1
                names = ("boxes", "scores", "labels")
                yield number, {name: found[name][row] for name in names}


def make_optimizer(steps: int) -> keras.optimizers.Optimizer:
    """Returns Adam with a warm-up, a cosine, and a lower rate of offsets."""
    warm_up = min(_WARM_UP, steps // 4)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=_RATE, warmup_steps=warm_up
    )
    optimizer = keras.optimizers.Adam(rate, beta_2=0.99, global_clipnorm=5.0)
    return training.deformable_optimizer(optimizer, _OFFSET_MULTIPLIER)


def weigh(images: tf.Tensor, masks: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Appends the weight of each pixel, shaped like `masks`."""
    background = tf.equal(masks[..., 0], 0)
    return images, masks, tf.where(background, _BACKGROUND_WEIGHT, 1.0)


def follow_sizes(
    model: keras.Model, part: pathlib.Path
) -> dict[str, float | None]:
    """Returns how closely a segmenter's dilation follows the sizes of digits.

    It is Spearman's correlation of the effective dilation in a digit's box with
    the square root of the box's area, by deformable layer; None if all have the
    same dilation.

    Args:
        model: The segmenter.
        part: A part of the scenes, of which the first ones are taken.
    """
    import scipy.stats

    photographs = _digit_scenes.read(part, "detect").photographs[:_MEASURED]
    images = np.stack([data.read_image(p.path) for p in photographs])
    found = np.concatenate([p.boxes for p in photographs])
    sizes = np.sqrt((found[:, 2:] - found[:, :2]).prod(1))
    rows = np.repeat(range(len(images)), [len(p.boxes) for p in photographs])
    boxes = np.concatenate([rows[:, None], found], 1)
    followed = {}
    for layer in deformable_layers(model.backbone):
        dilation = visualization.effective_dilation(
            model.backbone, layer, images.astype("float32"), boxes
        )
        known = np.isfinite(dilation)
        followed[layer.name] = None
        if len(set(dilation[known])) > 1:
            found = scipy.stats.spearmanr(dilation[known], sizes[known])
            followed[layer.name] = float(found.statistic)
    return followed


def _chunks(items: Sequence[Any], size: int = 100) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
