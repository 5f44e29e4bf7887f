# SPDX-License-Identifier: Apache-2.0
"""Prepares a run: seeds, precision, data, backbone, optimizer."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_deform import data, models, training
from tf_deform._keras import flatten_layers, keras
from tf_deform.tasks._run import Run

LOGGER = logging.getLogger("tf_deform")
_MOMENTUM = 0.9
# Source: the detectors' recipe has 1e-4. There it is added to gradients, so
# that momentum makes 1 / (1 - momentum) of it; Keras takes it from the weights.
_DECAY = 1e-4 / (1 - _MOMENTUM)
# Norm of all gradients together: larger ones come from broken labels, or from
# the first steps of new heads.
_CLIP = 10.0
_OFFSET_MULTIPLIER = 0.1
# Bins that move as fast find nothing in some runs. Source: Dai et al. 2017,
# arXiv:1703.06211, section 4.1.
_POOLING_OFFSET_MULTIPLIER = 0.01
_WARM_UP = 500
_REFERENCE_BATCH = 16
# Photographs for validation below which the log says that they are few.
_FEW = 5


@contextlib.contextmanager
def reproducible(settings: Mapping[str, Any]) -> Iterator[None]:
    """Sets seeds, determinism and the policy of a run.

    Determinism stays on for the process: TensorFlow's graphs know it.
    """
    keras.utils.set_random_seed(settings["seed"])
    if settings["deterministic"]:
        tf.config.experimental.enable_op_determinism()
    before = keras.mixed_precision.dtype_policy()
    kind = settings["mixed_precision"]
    keras.mixed_precision.set_dtype_policy(
        f"mixed_{kind}" if kind else "float32"
    )
    try:
        yield
    finally:
        keras.mixed_precision.set_dtype_policy(before)


# Data.


# What the reader takes for each form of annotations.
_OPTIONS = {
    "voc": ("base", "crowds"),
    "coco": ("crowds",),
    "yolo": ("first_id", "crowds"),
    "masks": ("colours",),
}


def read(
    settings: Mapping[str, Any],
    source: str,
    known: Sequence[str] | None = None,
) -> Any:
    """Reads annotated photographs, and logs what the reader noticed.

    Args:
        settings: Settings of the task, of which those of reading are used.
        source: The photographs.
        known: Classes that those of the photographs are joined with by name.
            Where the files tell ids alone, the names must be given: training
            and validation may number their classes differently.
    """
    names = ("skip_broken", *_OPTIONS[source.partition(":")[0]])
    options = {name: settings[name] for name in names}
    found = data.read(source, classes=settings["classes"], **options)
    if known is not None:
        found = found.select(known)
    LOGGER.info("%s: %d photographs", source, len(found.photographs))
    for note in found.notes:
        LOGGER.info("  %s", note)
    if not found.photographs:
        raise ValueError(
            f"Expected photographs in {source}. Received: none. "
            + " ".join(found.notes)
        )
    return found


def read_parts(run: Run) -> tuple[Any, Any]:
    """Returns the photographs to learn from, and those for validation."""
    settings = run.settings
    train = read(settings, settings["data"])
    if isinstance(settings["val"], float):
        if len(train.photographs) < 2:
            raise ValueError(
                "Expected at least two photographs, as a share of them is kept "
                f"for validation. Received: one in {settings['data']}"
            )
        train, val = train.split(settings["val"], settings["seed"])
        LOGGER.info(
            "%d photographs to learn from, %d for validation",
            len(train.photographs),
            len(val.photographs),
        )
    else:
        val = read(settings, settings["val"], train.classes)
        paths = [
            {os.path.realpath(one.path) for one in part.photographs}
            for part in (train, val)
        ]
        if both := sorted(paths[0] & paths[1]):
            LOGGER.warning(
                "%d photographs for validation are also learned from, such as "
                "%s: the measures say nothing of other photographs",
                len(both),
                both[0],
            )
    if len(val.photographs) < _FEW:
        LOGGER.warning(
            "%d photographs for validation are few: the measures depend much "
            "on which they are (`val`, --val)",
            len(val.photographs),
        )
    longest = max(max(one.width, one.height) for one in train.photographs)
    if settings["tile"] and settings["tile"] > longest:
        LOGGER.warning(
            "No photograph to learn from is as large as `tile` (--tile), %d "
            "pixels: the longest side is %d, and the model sees all of them "
            "smaller than without it",
            settings["tile"],
            longest,
        )
    LOGGER.info("Classes: %s", ", ".join(train.classes))
    run.keep_files(training=train, validation=val)
    return train, val


# Models.


def make_backbone(settings: Mapping[str, Any]) -> keras.Model:
    """Makes the backbone with its weights."""
    network, weights = settings["backbone"], settings["weights"]
    if network.endswith((".keras", ".h5")):
        path, network = network, keras.saving.load_model(network, compile=False)
        _tell_precision(path, network, settings["mixed_precision"])
        _check_size(path, network, settings["size"])
    elif weights is None:
        weights = "imagenet"
    return models.backbone(network, weights, settings["size"])


def _check_size(path: str, network: keras.Model, size: int) -> None:
    """Checks a size against that of a network for images of one size alone.

    What is no network of images is left to `models.backbone` to refuse.
    """
    for image in getattr(network, "inputs", None) or ():
        given = tuple(image.shape[1:3])
        if (
            len(image.shape) == 4
            and None not in given
            and given != (size, size)
        ):
            raise ValueError(
                f"Expected `size` (--size) to be that of the images of {path}, "
                f"{given[0]}x{given[1]}. Received: {size}"
            )


def _tell_precision(
    path: str, network: keras.Model, wanted: str | None
) -> None:
    """Warns of layers that keep the precision with which they were saved."""
    kept = {
        layer.compute_dtype
        for layer in flatten_layers(network)
        if layer.weights and not isinstance(layer, keras.Model)
    } - {wanted}
    if wanted and kept:
        LOGGER.warning(
            "The backbone computes in %s, as it was saved; the rest of the "
            "model in %s. For a backbone in %s, make and save %s after "
            "keras.mixed_precision.set_dtype_policy('mixed_%s')",
            " and ".join(sorted(kept)),
            wanted,
            wanted,
            path,
            wanted,
        )


def prepare(model: keras.Model, settings: Mapping[str, Any]) -> None:
    """Makes layers of a model's backbone deformable, and freezes others.

    The model comes first, as it may have made the backbone's maps finer, by
    dilation that offsets do not follow.
    """
    if settings["deform"] != "none":
        try:
            surgery = models.make_deformable(
                model.backbone,
                settings["deform"],
                offset_dilation_rate=1,
                verbose=False,
            )
        except ValueError as error:
            raise ValueError(
                f"{error}. Choose other stages, a backbone that has such "
                "convolutions, as ResNet has, or none (`deform`, --deform)"
            ) from error
        LOGGER.info("Deformable layers of the backbone:\n%s", surgery)
    if settings["weights"] != "none":
        models.train_only(model.backbone, "c3-", freeze_batch_norm=True)
        LOGGER.info(
            "Of the backbone, the stem, stage c2 and batch normalization stay "
            "as its weights have them; with `weights` none (--weights none) "
            "all is trained"
        )


def follow_batch_norm(model: keras.Model, steps: int) -> None:
    """Lets moving averages follow within a run.

    Keras' momentum of .99 would keep a share of the start of `.99 ** steps`: a
    third after 100 steps. Here it averages over a twentieth of the run at most.
    """
    momentum = max(0.9, 1 - 20 / max(steps, 1))
    for layer in flatten_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, momentum)


def make_optimizer(
    settings: Mapping[str, Any], rate: float, steps: int
) -> keras.optimizers.Optimizer:
    """Returns momentum with a rate of its own for offsets.

    The rate rises for 500 steps, or a tenth of the run, and falls to a tenth
    after 8 and after 11 twelfths of the run: the recipe called "1x", in the
    length of this run.

    Args:
        settings: The run's.
        rate: The highest rate for steps of 16 images, if the settings name
            none.
        steps: The number of steps of the run.
    """
    highest = settings["lr"]
    if highest is None:
        highest = rate * settings["batch_size"] / _REFERENCE_BATCH
    warm_up = min(_WARM_UP, steps // 10)
    LOGGER.info(
        "%d steps of %d images; learning rate %.3g after %d steps",
        steps,
        settings["batch_size"],
        highest,
        warm_up,
    )
    drops = sorted({steps * part // 12 for part in (8, 11)} - {0})
    optimizer = keras.optimizers.SGD(
        training.WarmUpSteps(highest, drops, warm_up_steps=warm_up),
        momentum=_MOMENTUM,
        weight_decay=_DECAY,
        global_clipnorm=_CLIP,
    )
    pooling = settings.get("pooling", "align") != "align"
    pooling |= settings.get("model") == "rfcn"
    return training.deformable_optimizer(
        optimizer,
        _POOLING_OFFSET_MULTIPLIER if pooling else _OFFSET_MULTIPLIER,
    )
