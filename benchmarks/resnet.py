# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 and its deformable twin: forward and training step, in turns.

    python benchmarks/resnet.py

In the twin the 13 convolutions of 3x3 in the stages conv3 to conv5 are
deformable. The twin starts with the plain model's weights and gives the same
outputs, which is tested before anything is timed.
"""

import argparse
import os
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import timing  # noqa: E402
from contenders import configure_tensorflow  # noqa: E402
from report import markdown  # noqa: E402
from xla import make_step  # noqa: E402

import tf_deform  # noqa: E402

# Matches the 3x3 convolution in the middle of a block.
LAYERS = re.compile(r"conv[345]_block\d+_2_conv")
NUM_LAYERS = 13
# Bounds the difference relative to the largest output: float32 sums are in
# another order.
TOLERANCE = 1e-5


def make_plain(size: int | None) -> keras.Model:
    """Returns ResNet-50 without its classifier, with random weights."""
    return keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(size, size, 3)
    )


def make_twin(plain: keras.Model) -> keras.Model:
    """Returns the model with deformable layers and the same weights."""

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if LAYERS.fullmatch(layer.name):
            return tf_deform.layers.DeformableConv2D(
                **config, modulation="2sigmoid"
            )
        return type(layer).from_config(config)

    twin = keras.models.clone_model(plain, clone_function=clone)
    for layer in plain.layers:
        if layer.weights:
            twin.get_layer(layer.name).set_weights(layer.get_weights())
    return twin


def count_deformable(model: keras.Model) -> int:
    return sum(
        isinstance(layer, tf_deform.layers.DeformableConv2D)
        for layer in model.layers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    configure_tensorflow(arguments.threads)
    keras.utils.set_random_seed(0)
    plain = make_plain(arguments.size)
    models = {"plain": plain, "deformable": make_twin(plain)}
    assert count_deformable(models["deformable"]) == NUM_LAYERS
    shape = (arguments.batch, arguments.size, arguments.size, 3)
    images = np.random.default_rng(0).normal(size=shape).astype("float32")

    runs = {}
    outputs = {}
    for name, model in models.items():
        function = tf.function(lambda x, model=model: model(x, training=False))
        runs[name, "forward"] = lambda f=function: f(images).numpy()
        outputs[name] = runs[name, "forward"]()
    error = np.abs(outputs["deformable"] - outputs["plain"]).max()
    error /= np.abs(outputs["plain"]).max()
    if not error <= TOLERANCE:
        sys.exit(
            "Expected the twin to give what the plain model gives. Received "
            f"a difference of {error:.2g} of the largest number"
        )
    print(f"difference at the start: {error:.1g} of the largest number")
    for name, model in models.items():
        model.compile(keras.optimizers.SGD(1e-6), "mse", jit_compile=False)
        targets = tf.zeros(model.compute_output_shape(images.shape))
        runs[name, "step"] = make_step(model, (tf.constant(images), targets))

    medians = timing.medians(runs, arguments.repeats, untimed=2)
    calls = ("forward", "step")
    rows = [
        [name, *(f"{medians[name, call]:.1f}" for call in calls)]
        for name in models
    ]
    ratios = (medians["deformable", c] / medians["plain", c] for c in calls)
    rows.append(["ratio", *(f"{ratio:.2f}" for ratio in ratios)])
    header = ("model", "ms forward", "ms per step")
    print(f"\n{markdown(header, rows, words=1)}")


if __name__ == "__main__":
    main()
