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


def train(row: Row) -> None:
    """Trains from zero displacements: they move, and the loss falls."""
    images = images_of(row)
    shape = images.shape[1:]
    if row["sizes"] == "unknown":
        shape = [None if size > 6 else size for size in shape]
    layer = layer_of(row)
    model = keras.Sequential([keras.Input(shape), layer])
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
        assert np.all(np.any(weight, tuple(range(weight.ndim - 1)))), (
            weight.path
        )


def check_gradients(row: Row) -> None:
    """Compares all gradients with differences, in float64."""
    layer = layer_of(row, dtype="float64")
    rng = np.random.default_rng(2)
    images = tf.constant(images_of(row))
    layer.build(images.shape)
    # Samples move by more than a pixel, each by another distance.
    for weight in layer.weights:
        scale = 0.5 / np.sqrt(np.prod(weight.shape[:-1]))
        weight.assign(rng.normal(0, scale, weight.shape))
    fields = layer.offset_bias.shape[0]
    if layer.modulation:
        fields = fields // 3 * 2
    bias = rng.normal(0, 0.5, layer.offset_bias.shape)
    bias[:fields] += np.tile([1.4, -2.3], fields // 2)
    layer.offset_bias.assign(bias)
    factors = rng.normal(size=layer.compute_output_shape(images.shape))

    def loss(images: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(layer(images) * factors)

    if row["mode"] != "eager":
        signature = [None if size > 6 else size for size in images.shape]
        if row["sizes"] == "known":
            signature = images.shape
        loss = tf.function(
            loss,
            input_signature=[tf.TensorSpec(signature, tf.float64)],
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


def text_of(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.items())


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
            reason = f"{type(error).__name__}: {error}"[:500]
            failed.append(f"{text_of(row)}\n    {reason}")
    assert not failed, f"{len(failed)} of {len(rows)}:\n" + "\n".join(failed)


COVER = pairwise({**AXES, **MORE_AXES})


def test_the_cover_holds_every_pair():
    axes = {**AXES, **MORE_AXES}
    held = {frozenset(pair) for row in COVER for pair in pairs_of(row)}
    for first, second in itertools.combinations(axes, 2):
        for one, other in itertools.product(axes[first], axes[second]):
            assert frozenset([(first, one), (second, other)]) in held
    assert len(COVER) < 30
    assert pairwise(axes) == COVER


def test_the_grid_holds_every_combination():
    rows = grid()
    assert len(rows) == 4 * 2 * 3 * 4 * 2 * 2 * 2 * 2
    axes = {**AXES, **MORE_AXES}
    held = {frozenset(pair) for row in rows for pair in pairs_of(row)}
    wanted = {frozenset(pair) for row in COVER for pair in pairs_of(row)}
    assert held == wanted and rows[0].keys() == axes.keys()


@pytest.mark.parametrize("index", range(len(COVER)))
def test_pairwise_cover(index):
    check([COVER[index]], gradients=True)


_WITHOUT_ONEDNN = """
import sys

sys.path += sys.argv[1:]
import training_grid_test as grid

rows = [row for row in grid.COVER if row["mode"] != "xla"]
grid.check(rows, gradients=False)
print("trained", len(rows))
"""


def test_without_onednn(run_python):
    """Tests TensorFlow's own kernels, which have other limits."""
    received = run_python(
        _WITHOUT_ONEDNN,
        pathlib.Path(__file__).parent,
        pathlib.Path(__file__).parents[1] / "lib",
        TF_ENABLE_ONEDNN_OPTS=0,
    )
    assert received.startswith("trained")


PARTS = 32


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whole_grid(part):
    check(grid()[part::PARTS], gradients=False)
