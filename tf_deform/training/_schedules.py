# SPDX-License-Identifier: Apache-2.0
"""The learning rate of detectors: warm-up, then steps down."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_deform._keras import keras


@keras.saving.register_keras_serializable("tf_deform")
class WarmUpSteps(keras.optimizers.schedules.LearningRateSchedule):
    """Raises a learning rate linearly, and multiplies it at some steps.

        rate = learning_rate * factor ** (number of `drops` that are at most
               the step) * min(1, warm_up_factor + (1 - warm_up_factor) *
               step / warm_up_steps)

    mmdetection's "1x" is 12 epochs with a warm-up of 500 steps from 0.001 and a
    tenth of the rate after 8 and 11 epochs:

        rate = tf_deform.training.WarmUpSteps(0.02, (8 * steps, 11 * steps))
        optimizer = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-3)

    Args:
        learning_rate: The rate after the warm-up.
        drops: The steps from which the rate is multiplied once more, in rising
            order.
        factor: The factor of each drop.
        warm_up_steps: The number of steps of the warm-up; 0 is none.
        warm_up_factor: The share of the rate at step 0.
        name: The name of the schedule.

    Raises:
        TypeError: An argument has another type.
        ValueError: A number is negative or not finite, or `drops` do not rise.
    """

    def __init__(
        self,
        learning_rate: float,
        drops: Sequence[int] = (),
        factor: float = 0.1,
        warm_up_steps: int = 500,
        warm_up_factor: float = 0.001,
        name: str = "WarmUpSteps",
    ) -> None:
        super().__init__()
        self.learning_rate = _number(learning_rate, "learning_rate")
        self.drops = tuple(_count(drop, "drops") for drop in drops)
        if list(self.drops) != sorted(set(self.drops)):
            raise ValueError(
                f"Expected `drops` to rise. Received: {self.drops}"
            )
        self.factor = _number(factor, "factor")
        self.warm_up_steps = _count(warm_up_steps, "warm_up_steps")
        self.warm_up_factor = _number(warm_up_factor, "warm_up_factor")
        self.name = name

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.int64)
        passed = tf.reduce_sum(
            [tf.cast(step >= drop, tf.float32) for drop in self.drops] or [0.0]
        )
        rate = self.learning_rate * tf.pow(self.factor, passed)
        done = tf.cast(step, tf.float32) / max(1, self.warm_up_steps)
        part = self.warm_up_factor + (1 - self.warm_up_factor) * done
        return tf.where(step < self.warm_up_steps, rate * part, rate)

    def get_config(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "drops": list(self.drops),
            "factor": self.factor,
            "warm_up_steps": self.warm_up_steps,
            "warm_up_factor": self.warm_up_factor,
            "name": self.name,
        }


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"Expected `{name}` to be a number. Received: {value!r}"
        )
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"Expected `{name}` to be a finite number of at least 0. Received: "
            f"{value}"
        )
    return float(value)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"Expected `{name}` to be in whole steps. Received: {value!r}"
        )
    if value < 0:
        raise ValueError(
            f"Expected `{name}` to be at least 0. Received: {value}"
        )
    return int(value)
