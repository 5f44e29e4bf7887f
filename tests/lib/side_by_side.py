# SPDX-License-Identifier: Apache-2.0
"""Compares an optimizer that has a rate for offsets with two optimizers.

The oracle of `deformable_optimizer`: one optimizer steps the offsets at their
rate, the other the rest, side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._keras import keras
from tf_deform.training import deformable_optimizer

# Not a power of two: a gradient that is scaled instead would round otherwise.
MULTIPLIER = 0.1
RATE = 0.01
NAMES = ("kernel", "bias", "offset_kernel", "offset_bias", "offset_hidden_0")
# Which of them are offsets.
OFFSETS = np.array([name.startswith("offset_") for name in NAMES])


class Weights(keras.layers.Layer):
    """Holds weights of which some are named as those of offsets."""

    def build(self, shape: Any = None) -> None:
        for name in NAMES:
            self.add_weight(
                name=name, shape=(3, 4), initializer="glorot_uniform"
            )
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs


def weights() -> list[Any]:
    """Makes equal weights in every call, in a layer of a misleading name."""
    keras.utils.set_random_seed(0)
    layer = Weights(name="offset_head")
    layer(np.zeros((2, 2), np.float32))
    return layer.trainable_weights


def values(variables: Sequence[Any]) -> np.ndarray:
    return np.array([variable.numpy() for variable in variables])


def scaled(rate: float) -> float:
    """Returns the rate of offsets, rounded as the optimizer rounds it."""
    return float(np.float32(rate) * np.float32(MULTIPLIER))


def run(
    optimizer: Any,
    variables: Sequence[Any],
    mine: np.ndarray,
    *,
    graph: bool,
    jit: bool = False,
    steps: int = 5,
    change: Callable[[np.ndarray], np.ndarray] = lambda gradients: gradients,
    between: Callable[[Any, int], None] = lambda optimizer, step: None,
) -> None:
    """Takes steps along random gradients, equal in every call.

    Args:
        optimizer: An optimizer for the variables of which `mine` is True.
        variables: The variables of `weights`.
        mine: One bool for each of them.
        graph: Whether the steps are taken in a graph.
        jit: Whether XLA compiles the graph.
        steps: Their number.
        change: Changes the gradients of all variables first.
        between: Is called before each step with the optimizer.
    """
    rng = np.random.default_rng(1)
    chosen = [v for v, wanted in zip(variables, mine) if wanted]

    def step(gradients: list[tf.Tensor]) -> None:
        optimizer.apply_gradients(zip(gradients, chosen))

    if graph:
        step = tf.function(step, jit_compile=jit)
    for index in range(steps):
        gradients = rng.normal(size=(len(mine), 3, 4)).astype(np.float32)
        between(optimizer, index)
        step([tf.constant(g) for g in change(gradients)[mine]])


def difference(
    make: Callable[[float], Any],
    *,
    between: Callable[[Any, int, bool], None] = lambda *_: None,
    change: Callable[[np.ndarray], np.ndarray] = lambda gradients: gradients,
    decay_offsets: bool = True,
    **options: Any,
) -> float:
    """Returns the largest difference to two optimizers side by side.

    Args:
        make: Makes an optimizer of a learning rate.
        between: Is called before each step with the optimizer, the step and
            whether it is the optimizer of offsets alone.
        change: Changes gradients before the two optimizers see them.
        decay_offsets: See `deformable_optimizer`.
        options: See `run`.
    """
    start = values(weights())
    tested, expected = weights(), weights()
    run(
        deformable_optimizer(make(RATE), MULTIPLIER, decay_offsets),
        tested,
        OFFSETS | True,
        between=lambda optimizer, step: between(optimizer, step, False),
        **options,
    )
    for mine, rate in ((~OFFSETS, RATE), (OFFSETS, scaled(RATE))):
        of_offsets = bool(mine[-1])
        run(
            make(rate),
            expected,
            mine,
            change=change,
            between=lambda optimizer, step, of_offsets=of_offsets: between(
                optimizer, step, of_offsets
            ),
            **options,
        )
    tested, expected = values(tested), values(expected)
    assert np.all(np.any(tested != start, axis=(1, 2))), "nothing was trained"
    return float(np.abs(tested - expected).max())
