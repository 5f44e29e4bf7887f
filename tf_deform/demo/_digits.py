# SPDX-License-Identifier: Apache-2.0
"""Learns to segment and to detect digits, and compares plain and deformable."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import data, layers, models, training
from tf_deform._files import writing
from tf_deform._keras import keras
from tf_deform.demo import _compare, _digit_scenes

_LOG = logging.getLogger("tf_deform")

SEGMENTERS = {
    "plain": {},
    "plain-wide": {"filters": (28, 56)},
    "plain-deep": {"depth": 4},
    "plain-dilated": {"dilation_rate": 2},
    "dcn-v1": {"deformable": True},
    "dcn-v2": {"deformable": True, "modulation": "2sigmoid"},
}
DETECTORS = {
    "plain": {},
    "dcn": {"deformable": True},
    "dpool": {"pooling": "deform"},
    "both": {"deformable": True, "pooling": "deform"},
}
# What is trained without the controls.
_FEW = {"segment": ("plain", "dcn-v2"), "detect": ("plain", "both")}
STEPS = 800
_EPOCHS, _BATCH = 8, 32
_RATE, _WARM_UP, _OFFSET_MULTIPLIER = 0.016, 50, 0.2
_SIZE = _digit_scenes.IMAGE_SIZE
# Nine of ten pixels are background: at full weight it would outweigh digits.
_BACKGROUND_WEIGHT = 0.5


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

        metrics.json    every number that is logged
        scenes/         the scenes, with masks and boxes
        runs/           a folder for each task, arm and seed, with the model

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
        _Task("segment", scenes, build_segmenter, "mIoU", list(SEGMENTERS)),
        _Task("detect", scenes, build_detector, "AP", list(DETECTORS)),
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
        columns = {task.metric: lambda r, m=task.metric: r[m]}
        lines = [_compare.table(results, columns), ""]
        lines += [_compare.sentence(pair, task.metric) for pair in compared]
        _LOG.info("\n%s", "\n".join(lines))
    training.write_metrics(out / "metrics.json", metrics)
    _LOG.info("Written to %s", out)
    return metrics


def build_trunk(
    filters: tuple[int, int] = (24, 48),
    depth: int = 3,
    dilation_rate: int = 1,
    deformable: bool = False,
    modulation: str | None = None,
) -> keras.Model:
    """Returns two convolutions of stride 2 and `depth` more behind them.

    Args:
        filters: Of the first one and of all others.
        depth: Number of convolutions at a quarter of the size.
        dilation_rate: Of the last two.
        deformable: Whether the last two are deformable.
        modulation: Theirs.

    Returns:
        A model from RGB images of 0 to 255 to the map "P2".
    """
    if deformable:
        last = functools.partial(layers.DeformableConv2D, modulation=modulation)
    else:
        last = functools.partial(
            keras.layers.Conv2D, dilation_rate=dilation_rate
        )
    image = keras.Input((_SIZE, _SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 255, dtype="float32")(image)
    for index in range(2 + depth):
        layer = last if index >= depth else keras.layers.Conv2D
        x = layer(
            filters[min(index, 1)],
            3,
            strides=2 if index < 2 else 1,
            padding="same",
            use_bias=False,
            name=f"conv{index + 1}",
        )(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(image, {"P2": x}, name="trunk")


def build_segmenter(arm: str, seed: int) -> keras.Model:
    """Returns an untrained segmenter, from images to logits of 11 classes."""
    keras.utils.set_random_seed(seed)
    trunk = build_trunk(**SEGMENTERS[arm])
    x = keras.layers.Conv2D(_digit_scenes.NUM_CLASSES, 1, name="score")(
        trunk.output["P2"]
    )
    x = keras.layers.UpSampling2D(4, interpolation="bilinear")(x)
    return keras.Model(trunk.input, x, name=arm.replace("-", "_"))


def build_detector(arm: str, seed: int) -> keras.Model:
    """Returns an untrained R-FCN of one map.

    The digits' boxes are 8 to 30 pixels wide (5 % to 95 %) and mostly higher
    than wide.
    """
    keras.utils.set_random_seed(seed)
    options = dict(DETECTORS[arm])
    pooling = options.pop("pooling", "plain")
    return models.RFCN(
        build_trunk(**options),
        10,
        pooling,
        _SIZE,
        [str(digit) for digit in range(10)],
        channels=48,
        rpn_channels=48,
        bins=3,
        anchor_scales=(2.5, 4, 6.25),
        anchor_ratios=(1.25,),
        candidates=128,
        proposals=32,
        hard_examples=16,
        max_detections=20,
        min_score=0.01,
        max_overlap=0.5,
        seed=seed,
    )


class _Task:
    """Trains and tests the arms of a task, each run in a folder of its own.

    Args:
        name: "segment" or "detect".
        scenes: Folder of the scenes.
        build: Makes the untrained model of an arm and a seed.
        metric: What the arms are compared by.
        arms: All arms, the plain ones first.
    """

    def __init__(
        self,
        name: str,
        scenes: pathlib.Path,
        build: Callable[[str, int], keras.Model],
        metric: str,
        arms: list[str],
    ) -> None:
        self.name, self.metric, self.arms = name, metric, arms
        self._scenes, self._build = scenes, build

    def pairs(self) -> list[tuple[str, str]]:
        """Returns pairs of every deformable arm with every plain one."""
        plain = [arm for arm in self.arms if arm.startswith("plain")]
        return [(a, b) for a in self.arms if a not in plain for b in plain]

    def run(
        self, parent: pathlib.Path, arm: str, seed: int, steps: int
    ) -> dict[str, Any]:
        folder = parent / f"{self.name}-{arm}-seed{seed}"
        settings = {"arm": arm, "seed": seed, "steps": steps}
        result = _compare.run_once(
            folder, settings, lambda: self._run(folder, **settings)
        )
        (folder / "last.keras").unlink(missing_ok=True)
        return result

    def _run(
        self, folder: pathlib.Path, arm: str, seed: int, steps: int
    ) -> dict[str, Any]:
        model = self._build(arm, seed)
        loss = None
        if self.name == "segment":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(make_optimizer(steps), loss, jit_compile=False)
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
            timer = Timer(steps // _EPOCHS)
            model.fit(
                self._batches(seed, start),
                initial_epoch=checkpoints.epoch,
                epochs=_EPOCHS,
                steps_per_epoch=steps // _EPOCHS,
                shuffle=False,  # The batches are shuffled already.
                callbacks=[timer, checkpoints],
                verbose=0,
            )
        with writing(folder / "model.keras") as partial:
            model.save(partial)
        times = [record["ms_per_step"] for record in checkpoints.history]
        return {
            "parameters": sum(
                int(np.prod(variable.shape))
                for variable in model.trainable_variables
            ),
            "ms_per_step": float(np.median(times)),
            **self._measure(model),
        }

    def read(self, part: str) -> Any:
        """Reads a part of the scenes as `Annotations`."""
        folder = self._scenes / part
        if self.name == "segment":
            source = f"masks:{folder}/images,{folder}/masks"
        else:
            source = f"coco:{folder}/instances.json,{folder}/images"
        return data.read(source)

    def _batches(self, seed: int, start: int) -> tf.data.Dataset:
        options = {"augment": False, "seed": seed, "start": start}
        if self.name == "detect":
            return data.detection_batches(
                self.read("train"), _SIZE, _BATCH, **options
            )
        batches = data.segmentation_batches(
            self.read("train"), _SIZE, _BATCH, **options
        )
        return batches.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)

    def _measure(self, model: keras.Model) -> dict[str, float]:
        held_out = self.read("test")
        if self.name == "detect":
            judge = training.CocoEvaluator(held_out.to_coco())
            measured = judge.evaluate(self._find(model, held_out))
            return {name: measured[name] for name in ("AP", "AP50", "AP75")}
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


class Timer(keras.callbacks.Callback):
    """Adds the time of a training step to the logs of each epoch.

    Args:
        steps: Number of steps of an epoch.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        seconds = time.perf_counter() - self._begin
        logs["ms_per_step"] = 1000 * seconds / self._steps
        _LOG.info(
            "  epoch %d, %.0f s: loss %.3f", epoch + 1, seconds, logs["loss"]
        )


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


def _chunks(items: Sequence[Any], size: int = 100) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
