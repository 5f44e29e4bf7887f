# SPDX-License-Identifier: Apache-2.0
"""Averages weights over the steps of training, to evaluate and save them."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras


class EmaEvaluation(keras.callbacks.Callback):
    """Keeps exponential moving averages of weights, which are then evaluated.

        average += (1 - m) * (weight - average),  m = min(momentum,
                                                          (1 + n) / (10 + n))

    after each step, n being the number of steps so far, so that the weights of
    the first steps do not count for long. Moving means and variances of batch
    normalization are averaged alike: they belong to the weights.

    `fit` evaluates its `validation_data` with the averages. `CocoCallback` and
    `BestAndLast` take this callback as `ema`: then the model that is judged is
    the one that is saved as the best. Training itself goes on with the weights
    as they were, to the bit. `keras.callbacks.SwapEMAWeights` swaps by adding
    and subtracting, which rounds them, and averages no batch normalization.

        ema = tf_deform.training.EmaEvaluation()
        best = tf_deform.training.BestAndLast("run", "val_loss", "min", ema=ema)
        model.fit(x, y, validation_data=(vx, vy), callbacks=[ema, best])

    Args:
        momentum: The momentum after many steps, from 0 to below 1. An average
            reaches back about 1 / (1 - momentum) steps.

    Raises:
        TypeError: `momentum` is no number.
        ValueError: `momentum` is out of its range.
    """

    def __init__(self, momentum: float = 0.999) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
            raise TypeError(
                f"Expected `momentum` to be a number. Received: {momentum!r}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(
                "Expected `momentum` to be at least 0 and below 1. Received: "
                f"{momentum}"
            )
        self._momentum = float(momentum)
        self._built_for: Any = None
        self._weights: list[tf.Variable] = []
        self._averages: list[tf.Variable] = []
        self._evaluation = contextlib.ExitStack()

    def build(self, model: Any) -> None:
        """Starts the averages at the weights of a model that is built.

        It does nothing if it has done so before, for the same model.
        """
        if self._built_for is model:
            return
        self._built_for = model
        self._weights = [
            _keras.tf_variable(weight)
            for weight in [*model.trainable_variables, *_statistics(model)]
        ]
        self._averages = [
            tf.Variable(weight, trainable=False) for weight in self._weights
        ]

        def update() -> None:
            count = tf.cast(model.optimizer.iterations, tf.float32)
            kept = tf.minimum(self._momentum, (1 + count) / (10 + count))
            # Keras calls back once for so many steps.
            kept = kept ** float(model.steps_per_execution)
            for weight, average in zip(self._weights, self._averages):
                # An average of equal numbers stays this number, to the bit.
                change = weight - average
                average.assign_add(tf.cast(1 - kept, change.dtype) * change)

        self._update = tf.function(update)

    @property
    def variables(self) -> list[tf.Variable]:
        """The averages."""
        return self._averages

    @contextlib.contextmanager
    def averages(self) -> Iterator[None]:
        """Lets a model have its averages for weights for as long as it runs."""
        live = [weight.numpy() for weight in self._weights]
        try:
            for weight, average in zip(self._weights, self._averages):
                weight.assign(average)
            yield
        finally:
            for weight, value in zip(self._weights, live):
                weight.assign(value)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._evaluation.close()  # An evaluation may have ended by an error.
        self.build(self.model)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._update()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._evaluation.enter_context(self.averages())

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self._evaluation.close()


def _statistics(model: Any) -> list[Any]:
    """Returns what the layers that are trained write by themselves."""
    return [
        variable
        for layer in _keras.flatten_layers(model)
        if layer.trainable
        for variable in _keras.own_variables(layer)
        if not variable.trainable and "float" in str(variable.dtype)
    ]
