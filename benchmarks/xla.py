# SPDX-License-Identifier: Apache-2.0
"""Training steps with and without XLA, of a deformable model and of its twin.

    python benchmarks/xla.py

XLA on a CPU is slower than TensorFlow for some models, and faster for others.
The deformable layers should not lose more than the plain layers that they
replace. So the ratio of a step with `jit_compile=True` to a step without it is
divided by the same ratio of the plain twin. Models take turns.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import timing  # noqa: E402
from contenders import configure_tensorflow  # noqa: E402
from report import markdown  # noqa: E402

import tf_deform  # noqa: E402

GOAL = 1.05


def stack(layer) -> keras.Model:
    """Returns four convolutions, deformable or not, with little else."""
    inputs = x = keras.Input((32, 32, 64))
    for _ in range(4):
        x = layer(64, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, keras.layers.Conv2D(11, 1)(x))


def make(name: str, deformable: bool) -> keras.Model:
    if name == "stack":
        return stack(
            tf_deform.layers.DeformableConv2D
            if deformable
            else keras.layers.Conv2D
        )
    from tf_deform.demo import _digit_models

    return _digit_models.build_segmenter("dcn-v2" if deformable else "plain", 0)


def make_step(model: keras.Model, batch: Any) -> Callable[[], Any]:
    """Returns a training step of a compiled model, which waits for its end.

    The step computes forward, backward and new weights.
    """
    model.make_train_function()
    return lambda: tf.nest.map_structure(
        np.asarray, model.train_function(iter([batch]))
    )


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns the common options of programs that time one of these models."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "--model",
        choices=("segmentation", "stack"),
        default="segmentation",
        help="the demo's segmenter, or four convolutions of 64 channels "
        "(%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    configure_tensorflow(arguments.threads, 0)

    rng = np.random.default_rng(0)
    steps = {}
    for deformable in (False, True):
        for jit_compile in (False, True):
            keras.utils.set_random_seed(0)
            model = make(arguments.model, deformable)
            model.compile(
                "sgd",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                jit_compile=jit_compile,
            )
            assert model.jit_compile is jit_compile
            size = model.output_shape[1:3]
            inputs = rng.integers(
                0, 255, (arguments.batch, *model.input_shape[1:])
            ).astype(model.inputs[0].dtype)
            labels = rng.integers(0, 11, (arguments.batch, *size))
            batch = tf.constant(inputs), tf.constant(labels)
            steps[deformable, jit_compile] = make_step(model, batch)

    medians = timing.medians(steps, arguments.steps, untimed=3)
    ratios, rows = {}, []
    for deformable, name in ((False, "plain"), (True, "deformable")):
        without, with_ = (medians[deformable, jit] for jit in (False, True))
        ratios[deformable] = with_ / without
        times = f"{without:.1f}", f"{with_:.1f}"
        rows.append([name, *times, f"{ratios[deformable]:.3f}"])
    header = ("model", "ms per step", "with XLA", "ratio")
    print(f"\n{markdown(header, rows, words=1)}")
    print(
        f"\nratio of ratios: {ratios[True] / ratios[False]:.3f} "
        f"(goal: at most {GOAL})"
    )


if __name__ == "__main__":
    main()
