# SPDX-License-Identifier: Apache-2.0
"""Times ResNet-50 before and after `make_deformable`, side by side, on the CPU.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --jit

Both models run in one process, in random turns, a forward pass and a training
step of plain SGD; the layers of c3 to c5 look 2 pixels away (root mean square).
Each model's peak memory is that of a process of its own.
"""

import argparse
import functools
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import report
import timing
from contenders import configure_tensorflow

KINDS = ("plain", "deformable")
CALLS = ("forward", "training step")


def make(kind: str, images: Any) -> Any:
    """Returns ResNet-50, plain or deformable."""
    import keras

    import tf_deform

    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=images.shape[1:]
    )
    if kind == "plain":
        return model
    before = np.asarray(model(images))
    tf_deform.make_deformable(model, verbose=False)
    difference = timing.disagreement(np.asarray(model(images)), before)
    if not difference < timing.TOLERANCES["float32"]:
        raise RuntimeError(f"Expected equal outputs. Received: {difference}")
    rng = np.random.default_rng(0)
    for layer in tf_deform.deformable_layers(model):
        layer.offset_bias.assign(rng.normal(0, 2, layer.offset_bias.shape))
    return model


def calls_of(model: Any, images: Any, jit: bool) -> dict[str, Callable]:
    """Returns the calls to time, by name."""
    import tensorflow as tf

    def forward() -> tf.Tensor:
        return model(images, training=False)

    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(images, training=True)))
        weights = [weight.value for weight in model.trainable_variables]
        for weight, gradient in zip(weights, tape.gradient(loss, weights)):
            # So small that the offsets stay what they are.
            weight.assign_sub(1e-12 * gradient)
        return loss

    def run(function: Callable) -> Any:
        return np.asarray(function())

    return {
        name: functools.partial(run, tf.function(each, jit_compile=jit))
        for name, each in zip(CALLS, (forward, step))
    }


def peak_memory(kind: str, arguments: argparse.Namespace) -> float:
    """Returns the peak memory in MiB of a process that trains a model."""
    command = [sys.executable, __file__, "--memory-of", kind]
    command += ["--size", str(arguments.size), "--threads"]
    command += [str(arguments.threads), *["--jit"] * arguments.jit]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--jit", action="store_true", help="with XLA")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    configure_tensorflow(arguments.threads)
    import tensorflow as tf

    shape = (2, arguments.size, arguments.size, 3)
    images = np.random.default_rng(0).normal(size=shape).astype("float32")
    images = tf.constant(images)
    if arguments.memory_of:
        model = make(arguments.memory_of, images)
        for _ in range(3):
            calls_of(model, images, arguments.jit)["training step"]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    samplers = {}
    for kind in KINDS:
        model = make(kind, images)
        for name, call in calls_of(model, images, arguments.jit).items():
            call()
            samplers[name, kind] = call
    samplers = timing.HostClock().samplers(samplers)
    times = timing.take_turns(samplers, arguments.repeats)
    print("| | plain ms | deformable ms | ratio | 95 % interval |")
    print("|---|---:|---:|---:|---|")
    for name in CALLS:
        plain, changed = (np.array(times[name, kind]) for kind in KINDS)
        ratios = changed / plain
        low, high = report.interval(ratios.tolist())
        print(
            f"| {name} | {np.median(plain):.0f} | {np.median(changed):.0f} | "
            f"{np.median(ratios):.3f} | {low:.3f} to {high:.3f} |"
        )
    plain, changed = (
        np.median([peak_memory(kind, arguments) for _ in range(3)])
        for kind in KINDS
    )
    print(
        f"| peak memory, MiB | {plain:.0f} | {changed:.0f} | "
        f"{changed / plain:.3f} | |"
    )


if __name__ == "__main__":
    main()
