# SPDX-License-Identifier: Apache-2.0
"""Trains every configuration of the convolution layer.

TensorFlow may run another convolution where it differentiates, so training is
tested apart from values. `make test` takes rows of the grid that hold every
pair of settings; `make test-full` takes all.
"""

import itertools
import pathlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_cases import displace
from operands import random
from pairwise import Row, all_rows, pairs_of, pairwise

from tf_deform.layers import DeformableConv2D

# The grid.
AXES = {
    "padding": ["valid", "same", (2, 1), ((0, 1), (3, 2))],
    "strides": [1, 2],
    "dilation_rate": [1, 2, (3, 2)],
    "dtype": ["float32", "mixed_float16", "mixed_bfloat16", "float64"],
    "implementation": ["native", "portable"],
    "modulation": [None, "2sigmoid"],
    "groups": [1, 2],
    "offset_groups": [1, 3],
}
# Settings that the grid's rows take in turn.
MORE_AXES = {
    "data_format": ["channels_last", "channels_first"],
    "lora_rank": [None, 2],
    "offset_dilation_rate": [None, 1],
    "boundary": ["zeros", "clamp"],
    "sizes": ["known", "unknown"],
    "mode": ["eager", "graph", "xla"],
}


def grid() -> list[Row]:
    rows = all_rows(AXES)
    # XLA takes seconds to compile, so only one row of eleven uses XLA.
    modes = ["eager", "graph"] * 5 + ["xla"]
    more = list(itertools.product(*{**MORE_AXES, "mode": modes}.values()))
    # The step has no common divisor with the number: every setting meets every
    # other.
    for index, row in enumerate(rows):
        values = more[index * 41 % len(more)]
        row.update(zip(MORE_AXES, values, strict=True))
    return rows


def layer_of(row: Row, **changes: Any) -> DeformableConv2D:
    names = row.keys() - {"sizes", "mode"}
    config = {name: row[name] for name in names}
    return DeformableConv2D(4, 3, **{**config, **changes})


def images_of(row: Row) -> np.ndarray:
    images = np.random.default_rng(0).normal(size=(4, 10, 11, 6))
    if row["data_format"] == "channels_first":
        images = np.transpose(images, (0, 3, 1, 2))
    return images


def shape_of(row: Row, images: Any) -> list[int | None]:
    """Returns the shape as far as it is known: the channels at least."""
    known = row["sizes"] == "known"
    return [size if known or size <= 6 else None for size in images.shape]


def train(row: Row) -> None:
    """Trains from zero displacements: they move, and the loss falls."""
    images = images_of(row)
    layer = layer_of(row)
    model = keras.Sequential([keras.Input(shape_of(row, images)[1:]), layer])
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)
    model.compile(
        keras.optimizers.Adam(0.02),
        "mse",
        run_eagerly=row["mode"] == "eager",
        jit_compile=row["mode"] == "xla",
    )
    targets = np.random.default_rng(1).normal(size=model(images).shape)
    losses = model.fit(
        images, targets, batch_size=len(images), epochs=6, verbose=0
    ).history["loss"]
    assert losses[-1] < 0.98 * losses[0]
    for weight in layer.trainable_weights:
        assert np.all(np.isfinite(weight)), weight.path
    moved = [layer.offset_kernel, layer.offset_bias]
    if row["lora_rank"]:
        moved.append(layer.lora_kernel_b)
    for weight in moved:
        changed = np.any(weight, tuple(range(weight.ndim - 1)))
        assert np.all(changed), weight.path


def check_gradients(row: Row) -> None:
    """Compares all gradients with differences, in float64."""
    layer = layer_of(row, dtype="float64")
    rng = np.random.default_rng(2)
    images = tf.constant(images_of(row))
    layer.build(images.shape)
    displace(layer)
    if layer.lora_rank:  # Starts at zero, too.
        layer.lora_kernel_b.assign(random(*layer.lora_kernel_b.shape))
    factors = rng.normal(size=layer.compute_output_shape(images.shape))

    def loss(images: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(layer(images) * factors)

    if row["mode"] != "eager":
        loss = tf.function(
            loss,
            input_signature=[tf.TensorSpec(shape_of(row, images), tf.float64)],
            jit_compile=row["mode"] == "xla",
        )
    weights = layer.trainable_weights
    with tf.GradientTape() as tape:
        tape.watch(images)
        value = loss(images)
    gradients = tape.gradient(value, [images, *(w.value for w in weights)])
    for index, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)

        def at(step: float, index: int = index, way: Any = direction) -> Any:
            """Returns the loss, `step` further on in this direction."""
            if index == 0:
                return loss(images + step * way)
            weight = weights[index - 1]
            before = weight.numpy()
            weight.assign(before + step * way)
            value = loss(images)
            weight.assign(before)
            return value

        # Weights of LoRA are always float32, and the loss is linear in them.
        step, tolerance = 1e-6, 1e-6
        if index and weights[index - 1].dtype == "float32":
            step, tolerance = 1.0, 1e-5
        expected = (at(step) - at(-step)) / (2 * step)
        actual = np.sum(gradient * direction)
        name = weights[index - 1].path if index else "inputs"
        scale = np.linalg.norm(gradient)
        assert scale > 0, name
        assert abs(actual - expected) < tolerance * max(scale, 1), name


def check(rows: list[Row], gradients: bool) -> None:
    """Checks all rows, and reports all failures at the end."""
    failed = []
    for row in rows:
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        try:
            train(row)
            if gradients or row["dtype"] == "float64":
                check_gradients(row)
        except Exception as error:
            failed.append(f"{row}\n    {type(error).__name__}: {error}"[:900])
    assert not failed, f"{len(failed)} of {len(rows)}:\n" + "\n".join(failed)


EVERY_AXIS = {**AXES, **MORE_AXES}
COVER = pairwise(EVERY_AXIS)


def pairs_in(rows: list[Row]) -> set[frozenset]:
    return {frozenset(pair) for row in rows for pair in pairs_of(row)}


def test_the_cover_and_the_grid_hold_every_pair():
    wanted = {
        frozenset([(first, one), (second, other)])
        for first, second in itertools.combinations(EVERY_AXIS, 2)
        for one in EVERY_AXIS[first]
        for other in EVERY_AXIS[second]
    }
    rows = grid()
    assert pairs_in(COVER) == pairs_in(rows) == wanted
    assert len(COVER) < 30 and pairwise(EVERY_AXIS) == COVER
    assert len(rows) == 4 * 2 * 3 * 4 * 2 * 2 * 2 * 2
    assert rows[0].keys() == EVERY_AXIS.keys()


@pytest.mark.parametrize("index", range(len(COVER)))
def test_pairwise_cover(index):
    check([COVER[index]], gradients=True)


_WITHOUT_ONEDNN = """
import sys

sys.path += sys.argv[1:]
import branch_test
import training_grid_test as grid

for config in branch_test.EMPTY_CONFIGS:
    for how in ("eager", "unknown", "batch"):
        branch_test.test_empty(config, how)
rows = [row for row in grid.COVER if row["mode"] != "xla"]
grid.check(rows, gradients=False)
print("trained", len(rows))
"""


def test_without_onednn(run_python):
    """Tests TensorFlow's own kernels, which have other limits."""
    layers = pathlib.Path(__file__).parent
    received = run_python(
        _WITHOUT_ONEDNN,
        layers,
        layers.parent / "lib",
        layers.parents[1] / "examples",
        TF_ENABLE_ONEDNN_OPTS=0,
    )
    assert received.startswith("trained")


PARTS = 32


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whole_grid(part):
    check(grid()[part::PARTS], gradients=False)
