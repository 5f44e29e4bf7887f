# SPDX-License-Identifier: Apache-2.0
"""Training steps with and without XLA, of a deformable model and of its twin.

    python benchmarks/xla.py

XLA on a CPU is slower than TensorFlow for some models, and faster for others.
What counts for the deformable layers is that they are not worse off than what
stood in their place: the ratio of a step with `jit_compile=True` to one without
is divided by the same ratio of the plain twin. Models take turns, step by step
in random order, so that a disturbance of the machine falls on all alike.
"""

import argparse
import os
import pathlib
import random
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tf_deform  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

GOAL = 1.05


def stack(layer) -> keras.Model:
    """Four convolutions that are deformable or not: little else to do."""
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
    import segmentation  # needs the examples' packages

    return segmentation.build_model("dcn-v2" if deformable else "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        choices=("segmentation", "stack"),
        default="segmentation",
        help="the demo's segmenter, or convolutions alone (%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)

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
            steps[deformable, jit_compile] = model.make_train_function() or (
                lambda model=model, batch=batch: model.train_function(
                    iter([batch])
                )
            )

    times = {key: [] for key in steps}
    for round_ in range(arguments.steps + 3):
        order = list(steps)
        random.Random(round_).shuffle(order)
        for key in order:
            start = time.perf_counter()
            tf.nest.map_structure(np.asarray, steps[key]())
            if round_ >= 3:  # the first ones trace and compile
                times[key].append(time.perf_counter() - start)
        if round_ % 10 == 0:
            print(f"round {round_} of {arguments.steps + 3}", flush=True)

    ratios = {}
    print("\n| model | ms per step | with XLA | ratio |\n|---|---:|---:|---:|")
    for deformable in (False, True):
        without, with_ = (
            statistics.median(times[deformable, jit]) * 1e3
            for jit in (False, True)
        )
        ratios[deformable] = with_ / without
        print(
            f"| {'deformable' if deformable else 'plain'} | {without:.1f} | "
            f"{with_:.1f} | {ratios[deformable]:.3f} |"
        )
    print(
        f"\nratio of ratios: {ratios[True] / ratios[False]:.3f} "
        f"(goal: at most {GOAL})"
    )


if __name__ == "__main__":
    main()
