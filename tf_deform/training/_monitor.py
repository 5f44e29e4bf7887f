# SPDX-License-Identifier: Apache-2.0
"""Watches, while a model is trained, where its deformable layers sample."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.layers._search import deformable_layers
from tf_deform.ops._arguments import boolean, positive

# Beyond this share of samples that have left the image, most of a layer's taps
# read nothing.
_MOST_LOST = 0.5
# Pixels. A sample that is displaced by so little reads, beside its own pixel, a
# thousandth of the next one: the layer is a plain convolution.
_STILL = 1e-3
# Epochs and steps after which offsets should have moved. Their branch begins
# with zeros, and a rate that warms up moves little in the first steps.
_PATIENCE, _STEPS = 3, 100


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """Describes where a layer samples, over all of its calls on a batch.

    Attributes:
        offset_mean, offset_p99: Mean and 99th percentile of the length of
            displacements, in pixels of the layer's input; NaN where one of them
            is no number.
        outside: Share of samples that lie outside of the image.
        lost: Share of samples that lie outside, of those that are inside
            without displacements.
        broken: Share of samples whose displacement or factor is no number.
        modulator: Mean factor, or None for a layer without modulation.
    """

    offset_mean: float
    offset_p99: float
    outside: float
    lost: float
    broken: float
    modulator: float | None


class SamplingMonitor(keras.callbacks.Callback):
    """Logs how far a model's deformable convolutions look, and warns.

    After each epoch the model runs once on a batch of images, as in inference.
    For each `DeformableConv2D`, in all its calls, with `path` its path (on
    Keras 2 its name), the logs get

        offset_mean/path    mean of |(dy, dx)|, in pixels of the layer's input
        offset_p99/path     99th percentile of |(dy, dx)|, in the same pixels
        outside/path        share of samples outside of the image, which read 0
        modulator/path      mean factor, of a layer with modulation

    A plain "same" convolution has samples outside as well, in its padding.
    `History` sees the logs, and so do the callbacks that come later in the list
    that `fit` is given, such as `CSVLogger` and `TensorBoard`, and the progress
    bar, which becomes long. With `summary=True` the logs get four numbers in
    place of all layers':

        offset_mean         mean of the layers' means
        offset_p99          largest of the layers' 99th percentiles
        outside, modulator  means of the layers' numbers

    `history`, a dictionary from the names above to lists of an epoch's number
    each, and `log_dir` have the numbers of all layers in either case.

    It warns once for each layer and reason:

    - Offsets explode: of the samples that are inside of the image without
      displacements, more than half are outside. These read 0 and have no
      gradient, so training does not bring them back.
    - Offsets never move: after three epochs, or at the end, the 99th percentile
      is below 0.001 pixels. Unless the layer is frozen, this is told after 100
      steps at the earliest.
    - Offsets or factors are no numbers: NaN or infinite.
    - A layer is not measured, because it is given its offsets or not called.

    Weights, moving averages, states of random numbers and losses of the model
    stay as they are.

        monitor = tf_deform.training.SamplingMonitor(validation_images)
        model.fit(x, y, callbacks=[monitor, keras.callbacks.CSVLogger("log")])

    Args:
        images: A batch of inputs of the model: an array, or the structure of
            arrays that the model takes. Or a `tf.data.Dataset` or
            `keras.utils.Sequence`, such as the validation data: its first batch
            is taken, without labels and weights.
        count: The number of images of the batch that are used, at most.
        log_dir: A folder into which the numbers also go, for TensorBoard,
            without Keras' callback; or None.
        summary: Whether the logs get totals, not the numbers of each layer.

    Raises:
        TypeError: An argument has another type.
        ValueError: `images` holds no image, or `count` is below 1. When
            training starts: the model has no deformable convolution that is
            measured, or does not run on `images`.
    """

    def __init__(
        self,
        images: Any,
        count: int = 8,
        log_dir: str | os.PathLike | None = None,
        summary: bool = False,
    ) -> None:
        super().__init__()
        self._summary = boolean(summary, "summary")
        self._images = _batch(images, positive(count, "count"))
        if log_dir is not None:
            if not isinstance(log_dir, (str, os.PathLike)):
                raise TypeError(
                    "Expected `log_dir` to be a path or None. Received: "
                    f"{log_dir!r}"
                )
            log_dir = os.fspath(log_dir)
            if os.path.exists(log_dir) and not os.path.isdir(log_dir):
                raise ValueError(
                    "Expected `log_dir` to be a folder. Received: "
                    f"{log_dir!r}, which is a file"
                )
        self._log_dir = log_dir
        self._start()

    def _start(self) -> None:
        self._writer = None
        self._epochs, self._first_step = 0, 0
        self.history: dict[str, list[float]] = {}
        self._last: list[tuple[str, Any, _Sampling]] = []
        self._said: set[tuple[str, str]] = set()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._start()
        self._first_step = self._step()
        # Keras 2 builds some models in their first step. All others are tried
        # here, so that no error comes after an epoch's work.
        if self.model.built:
            self._measure()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._measure()
        self._epochs += 1
        numbers = {}
        totals: dict[str, list[float]] = collections.defaultdict(list)
        for name, _, found in self._last:
            for key in ("offset_mean", "offset_p99", "outside", "modulator"):
                value = getattr(found, key)
                if value is not None:
                    numbers[f"{key}/{name}"] = value
                    totals[key].append(value)
        for key, value in numbers.items():
            self.history.setdefault(key, []).append(value)
        if logs is not None and self._summary:
            for key, values in totals.items():
                total = np.max if key == "offset_p99" else np.mean
                logs[key] = float(total(values))
        elif logs is not None:
            logs.update(numbers)
        if self._log_dir is not None:
            if self._writer is None:
                self._writer = tf.summary.create_file_writer(self._log_dir)
            with self._writer.as_default(step=epoch):
                for key, value in numbers.items():
                    tf.summary.write(key, value, metadata=scalar_metadata())
            self._writer.flush()
        self._warn_of_values()
        if self._epochs >= _PATIENCE:
            self._warn_of_stillness()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._epochs:
            self._warn_of_stillness()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measure(self) -> None:
        model = self.model
        calls = _run(model, self._images)
        names = _names(deformable_layers(model))
        self._last = [
            (name, layer, _summarize(layer, calls[id(layer)]))
            for name, layer in names.items()
            if calls[id(layer)]
        ]
        if not self._last:
            raise ValueError(
                "Expected a model in which a DeformableConv2D displaces by its "
                f"own branch. Received: model {model.name!r}, with "
                f"{len(names)} deformable convolutions, of which none did in a "
                "call on `images`"
            )
        measured = {name for name, *_ in self._last}
        self._warn(
            "not measured",
            {name: "" for name, layer in names.items() if name not in measured},
            "They were given their offsets, or not called, as the model ran "
            "on the images of SamplingMonitor.",
        )

    def _warn_of_values(self) -> None:
        self._warn(
            "offsets that are no numbers",
            {
                name: f"{found.broken:.0%} of the samples"
                for name, _, found in self._last
                if found.broken
            },
            "NaN or infinity came out of the layer's branch: from its weights, "
            "or from its inputs if an earlier layer is named too. Lower the "
            "learning rate, clip gradients, or look for NaN in the data.",
        )
        self._warn(
            "offsets that explode",
            {
                name: f"{found.lost:.0%} of the samples have left the image, "
                f"mean |offset| {found.offset_mean:.3g} pixels"
                for name, _, found in self._last
                if not found.broken and found.lost > _MOST_LOST
            },
            f"The bound is {_MOST_LOST:.0%} of those that a plain convolution "
            "reads inside of the image: a sample outside reads 0 and has no "
            "gradient, so it does not come back. Lower the learning rate of "
            "offsets (`tf_deform.training.deformable_optimizer`), or clip "
            "gradients.",
        )

    def _step(self) -> int:
        """Returns how many steps the model's optimizer has made."""
        optimizer = getattr(self.model, "optimizer", None)
        return int(optimizer.iterations) if optimizer is not None else 0

    def _warn_of_stillness(self) -> None:
        still = {}
        steps = self._step() - self._first_step
        for name, layer, found in self._last:
            if found.offset_p99 < _STILL:
                frozen = not any(
                    _keras.is_trainable(layer, weight)
                    for weight in layer._branch().values()
                )
                if frozen or steps >= _STEPS:
                    still[name] = "frozen" if frozen else "trainable"
        self._warn(
            "offsets that never move",
            still,
            f"After {self._epochs} epochs of {steps} steps together, 99 % of "
            f"them are below {_STILL} pixels: the layer still is a plain "
            "convolution. Its branch is frozen, the rate of offsets is too "
            "low, or no gradient arrives (unused outputs, or a loss that is "
            "not scaled in float16).",
        )

    def _warn(self, what: str, names: dict[str, str], why: str) -> None:
        """Warns of layers, of each once in a training."""
        new = {
            name: text
            for name, text in names.items()
            if (what, name) not in self._said
        }
        if not new:
            return
        self._said.update((what, name) for name in new)
        shown = ", ".join(
            f"{name} ({text})" if text else name for name, text in new.items()
        )
        warnings.warn(
            f"Deformable layers with {what}: {shown}. {why}"
            if what.startswith("offsets")
            else f"Deformable layers {what}: {shown}. {why}",
            RuntimeWarning,
            stacklevel=2,
        )


def scalar_metadata() -> Any:
    """Returns how TensorBoard's files mark a number.

    `tf.summary.scalar` does the same, but fails where TensorBoard itself, a
    package of its own, is not installed.
    """
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"
    return metadata


def _batch(images: Any, count: int) -> Any:
    """Returns the first images of a batch, as tensors."""
    given = images
    if isinstance(images, (tf.data.Dataset, keras.utils.Sequence)):
        if isinstance(images, tf.data.Dataset):
            images = next(iter(images), ())
        else:
            images = images[0]
        if isinstance(images, tuple):  # with labels, and weights of samples
            images = images[0] if images else None
    try:
        images = _keras.tree.map_structure(
            lambda value: tf.convert_to_tensor(value[:count]), images
        )
        found = _keras.tree.flatten(images)
    except (TypeError, ValueError, IndexError, KeyError):
        found = []
    if not found or not all(
        value.shape.rank
        and value.shape[0]
        and (value.dtype.is_floating or value.dtype.is_integer)
        for value in found
    ):
        raise ValueError(
            "Expected `images` to be a batch of the model's inputs with one "
            "image at least, or a tf.data.Dataset or keras.utils.Sequence of "
            f"such. Received: {str(given)[:80]} of type {type(given).__name__}"
        )
    return images


def _names(layers: Iterable[Any]) -> dict[str, Any]:
    """Returns layers by their paths, numbered where these are the same."""
    names: dict[str, Any] = {}
    counts: collections.Counter = collections.Counter()
    for layer in layers:
        path = _keras.path_of(layer)
        counts[path] += 1
        number = f"_{counts[path]}" if counts[path] > 1 else ""
        names[f"{path}{number}"] = layer
    return names


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Gives a model's state back, and has functions within it run eagerly."""
    variables = [
        _keras.tf_variable(weight) for weight in model.non_trainable_variables
    ]
    values = [variable.read_value() for variable in variables]
    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(eagerly)
        for variable, value in zip(variables, values):
            variable.assign(value)
        _keras.clear_losses(model)


def _run(model: Any, images: Any) -> dict[int, list[tuple[Any, np.ndarray]]]:
    """Runs a model as in inference.

    Returns:
        For each layer's id, of each call in which its branch ran, the shape of
        its inputs in channels last and what the branch predicted.

    Raises:
        ValueError: The model does not run.
    """
    calls: dict[int, list] = collections.defaultdict(list)
    original = DeformableConv2D._run_branch

    def record(self: Any, inputs: tf.Tensor) -> tf.Tensor:
        fields = original(self, inputs)
        if hasattr(fields, "numpy") and tf.size(fields) > 0:
            calls[id(self)].append((tuple(inputs.shape), fields.numpy()))
        return fields

    with _unchanged(model):
        with mock.patch.object(DeformableConv2D, "_run_branch", record):
            try:
                model(images, training=False)
            except Exception as error:
                shapes = ", ".join(
                    str(tuple(value.shape))
                    for value in _keras.tree.flatten(images)
                )
                raise ValueError(
                    f"Expected `images` on which model {model.name!r} runs. "
                    f"Received: images of the shapes {shapes}, and the error "
                    f"{type(error).__name__}: {error}"
                ) from error
    return calls


def _summarize(
    layer: Any, calls: list[tuple[tuple[int, ...], np.ndarray]]
) -> _Sampling:
    lengths, factors, outside, plain, broken = [], [], [], [], []
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    pairs = layer.offset_groups * taps
    for shape, fields in calls:
        offset = fields[..., : 2 * pairs].reshape(
            *fields.shape[:3], layer.offset_groups, *layer.kernel_size, 2
        )
        finite = np.isfinite(offset).all(-1)
        if layer.modulation:
            logits = fields[..., 2 * pairs :]
            finite &= np.isfinite(logits).reshape(finite.shape)
            factor = 0.5 + 0.5 * np.tanh(0.5 * logits)  # the sigmoid
            factors.append((1 + (layer.modulation == "2sigmoid")) * factor)
        # (out_h, 1, 1, kernel_h, 1) and (out_w, 1, 1, kernel_w)
        rows = _places(layer, shape[1], fields.shape[1], 0)[
            :, None, None, :, None
        ]
        columns = _places(layer, shape[2], fields.shape[2], 1)[:, None, None]
        size = shape[1:3]
        is_inside = _inside(layer, size, rows, columns)
        plain.append(np.broadcast_to(~is_inside, finite.shape))
        outside.append(
            ~_inside(
                layer, size, rows + offset[..., 0], columns + offset[..., 1]
            )
        )
        lengths.append(np.hypot(offset[..., 0], offset[..., 1]))
        broken.append(~finite)
    lengths, outside, plain, broken = (
        np.concatenate([np.ravel(each) for each in parts])
        for parts in (lengths, outside, plain, broken)
    )
    whole = np.isfinite(lengths).all()
    return _Sampling(
        offset_mean=float(lengths.mean(dtype=np.float64)) if whole else np.nan,
        offset_p99=float(np.percentile(lengths, 99)) if whole else np.nan,
        outside=float(outside.mean()),
        lost=float(outside[~plain].mean()) if not plain.all() else 0.0,
        broken=float(broken.mean()),
        modulator=float(
            np.concatenate([np.ravel(f) for f in factors]).mean(
                dtype=np.float64
            )
        )
        if factors
        else None,
    )


def _places(layer: Any, pixels: int, out: int, axis: int) -> np.ndarray:
    """Returns where a layer's taps are without displacements, `(out, taps)`."""
    taps, stride, rate = (
        each[axis]
        for each in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    before = 0
    if layer.padding == "same":
        spare = (out - 1) * stride + rate * (taps - 1) + 1 - pixels
        before = max(spare, 0) // 2
    elif layer.padding != "valid":
        before = layer.padding[axis][0]
    return np.add.outer(
        np.arange(out) * stride - before, np.arange(taps) * rate
    )


def _inside(layer: Any, size: Any, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Tells which samples lie in the image, which NaN does not."""
    inside = True
    for pixels, place in zip(size, (y, x)):
        low = place > -1 if layer.boundary == "zeros" else place >= 0
        inside = inside & low & (place < pixels)
    return inside
