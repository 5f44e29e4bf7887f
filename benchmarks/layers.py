# SPDX-License-Identifier: Apache-2.0
"""The layer next to `keras.layers.Conv2D`: forward and training step, in turns.

    python benchmarks/layers.py
    python benchmarks/layers.py --dtype bfloat16 --threads 1

A step computes forward and the gradients of inputs and weights. "Share" is what
the branch's filters add in arithmetic, 1 + 27 / channels; a ratio divided by it
tells what all the rest costs.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import timing  # noqa: E402
from contenders import configure_tensorflow  # noqa: E402
from report import markdown  # noqa: E402

import tf_deform  # noqa: E402

# Height, width, channels (of inputs and outputs).
SHAPES = (
    (64, 64, 64),
    (56, 56, 128),
    (28, 28, 256),
    (28, 28, 512),
    (14, 14, 512),
)
TAPS = 9
OFFSET = 2.0  # pixels, the standard deviation
# Bounds the difference of a new layer's outputs from Conv2D's, relative to the
# largest output.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
CALLS = ("forward", "step")


def make_pair(channels: int, dtype: str, inputs: tf.Tensor) -> dict[str, Any]:
    """Returns both layers, with equal weights but those of the branch.

    Raises:
        ValueError: if the outputs differ while the branch's weights are zero.
    """
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    common = dict(padding="same", dtype=keras.DTypePolicy(policy))
    plain = keras.layers.Conv2D(channels, 3, **common)
    deformable = tf_deform.layers.DeformableConv2D(
        channels, 3, modulation="2sigmoid", **common
    )
    expected = np.float32(plain(inputs))
    deformable.build(inputs.shape)
    deformable.set_weights(plain.get_weights())
    error = np.abs(np.float32(deformable(inputs)) - expected).max()
    error /= np.abs(expected).max()
    if not error <= TOLERANCES[dtype]:
        raise ValueError(
            "Expected a new layer to give what Conv2D gives. Received a "
            f"difference of {error:.2g} of the largest number"
        )
    kernel = deformable.offset_kernel
    draw = np.random.default_rng(1).normal(size=kernel.shape)
    kernel.assign(OFFSET / np.sqrt(TAPS * channels) * draw)
    return {"Conv2D": plain, "DeformableConv2D": deformable}


def make_calls(
    layer: keras.Layer, inputs: tf.Tensor, gradient: tf.Tensor
) -> dict[str, Callable[[], Any]]:
    """Returns the calls to time, which wait for all of their results."""
    forward = tf.function(lambda inputs: layer(inputs), autograph=False)

    @tf.function(autograph=False)
    def step(inputs: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs)
        sources = [inputs, *layer.trainable_variables]
        return [outputs, *tape.gradient(outputs, sources, gradient)]

    return {
        "forward": lambda: np.asarray(forward(inputs)),
        "step": lambda: [np.asarray(result) for result in step(inputs)],
    }


def measure(
    shape: tuple[int, int, int], batch: int, dtype: str, repeats: int
) -> dict[tuple[str, str], float]:
    """Returns medians in milliseconds, by layer and call."""
    height, width, channels = shape
    keras.utils.set_random_seed(0)
    size = (batch, height, width, channels)
    rng = np.random.default_rng(0)
    inputs, gradient = (tf.cast(rng.normal(size=size), dtype) for _ in range(2))
    calls = {
        (name, call): run
        for name, layer in make_pair(channels, dtype, inputs).items()
        for call, run in make_calls(layer, inputs, gradient).items()
    }
    return timing.medians(calls, repeats, untimed=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    configure_tensorflow(arguments.threads)
    rows, shares = [], {call: [] for call in CALLS}
    for shape in SHAPES:
        times = measure(
            shape, arguments.batch, arguments.dtype, arguments.repeats
        )
        share = 1 + 3 * TAPS / shape[-1]
        cells = ["x".join(map(str, shape)), f"{share:.2f}"]
        for call in CALLS:
            plain, layer = (
                times[name, call] for name in ("Conv2D", "DeformableConv2D")
            )
            shares[call].append(layer / plain / share)
            cells += [f"{plain:.2f}", f"{layer:.2f}", f"{layer / plain:.2f}"]
            cells.append(f"{layer / plain / share:.2f}")
        rows.append(cells)
    columns = ("Conv2D ms", "layer ms", "ratio", "/ share")
    header = ["shape", "share"]
    header += [f"{call}: {column}" for call in CALLS for column in columns]
    about = machine.describe()
    print(
        f"{arguments.dtype}, {arguments.threads} threads, batch "
        f"{arguments.batch}, {about['cpu']}, tf_deform with "
        f"{machine.instruction_set()}\n\n{markdown(header, rows, words=1)}\n"
    )
    means = (
        f"{call} {statistics.geometric_mean(values):.3f}"
        for call, values in shares.items()
    )
    print(f"Ratios divided by the share, geometric means: {', '.join(means)}")


if __name__ == "__main__":
    main()
