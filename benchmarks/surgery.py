# SPDX-License-Identifier: Apache-2.0
"""Times models before and after `make_deformable`, side by side, on the CPU.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --jit
    python benchmarks/surgery.py --model faster-rcnn --size 800

Both models, ResNet-50 alone or as the backbone of a Faster R-CNN, run in one
process, in random turns, a forward pass (of the detector: a prediction) and a
training step of plain SGD; the layers of c3 to c5 look 2 pixels away (root mean
square). Each model's peak memory is that of a process of its own.
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

MODELS = ("resnet50", "faster-rcnn")
KINDS = ("plain", "deformable")
CALLS = ("forward", "training step")


def make(name: str, kind: str, images: Any) -> Any:
    """Returns a model, plain or deformable."""
    import keras

    import tf_deform

    keras.utils.set_random_seed(0)
    if name == "resnet50":
        model = network = keras.applications.ResNet50(
            weights=None, include_top=False, input_shape=images.shape[1:]
        )
    else:
        model = tf_deform.models.FasterRCNN(
            tf_deform.models.backbone("resnet50", None, images.shape[1]),
            num_classes=80,
            image_size=images.shape[1],
        )
        network = model.backbone
        tf_deform.train_only(network, "c3-")
    if kind == "plain":
        return model
    before = [np.asarray(x) for x in tree(network(images))]
    tf_deform.make_deformable(network, "c3-c5", verbose=False)
    for x, y in zip(tree(network(images)), before, strict=True):
        difference = timing.disagreement(np.asarray(x), y)
        if not difference < timing.TOLERANCES["float32"]:
            raise RuntimeError(f"Expected equal results: {difference}")
    rng = np.random.default_rng(0)
    for layer in tf_deform.deformable_layers(network):
        layer.offset_bias.assign(rng.normal(0, 2, layer.offset_bias.shape))
    return model


def tree(values: Any) -> list[Any]:
    """Returns the tensors of a nested structure."""
    import tensorflow as tf

    return tf.nest.flatten(values)


def calls_of(model: Any, images: Any, jit: bool) -> dict[str, Callable]:
    """Returns the calls to time, by name."""
    import tensorflow as tf

    def forward() -> tf.Tensor:
        return model(images, training=False)

    def loss_of(outputs: Any) -> tf.Tensor:
        if hasattr(model, "compute_loss") and hasattr(model, "detect"):
            return model.compute_loss(images, objects, outputs)
        return tf.reduce_mean(tf.square(outputs))

    # Eight objects of each image, of 32 to 400 pixels.
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, images.shape[1] / 2, (images.shape[0], 8, 2))
    sizes = rng.uniform(32, images.shape[1] / 2, corners.shape)
    boxes = np.concatenate([corners, corners + sizes], -1)
    objects = {
        "boxes": tf.constant(boxes, "float32"),
        "labels": tf.constant(rng.integers(0, 80, boxes.shape[:2]), "int32"),
    }

    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(model(images, training=True))
        weights = [weight.value for weight in model.trainable_variables]
        for weight, gradient in zip(weights, tape.gradient(loss, weights)):
            # So small that the offsets stay what they are. Weights of classes
            # without objects have no gradient.
            if gradient is not None:
                weight.assign_sub(1e-12 * tf.convert_to_tensor(gradient))
        return loss

    def run(function: Callable) -> Any:
        return np.asarray(tree(function())[0])

    return {
        name: functools.partial(run, tf.function(each, jit_compile=jit))
        for name, each in zip(CALLS, (forward, step))
    }


def peak_memory(kind: str, arguments: argparse.Namespace) -> float:
    """Returns the peak memory in MiB of a process that trains a model."""
    command = [sys.executable, __file__, "--memory-of", kind]
    command += ["--model", arguments.model]
    command += ["--size", str(arguments.size), "--threads"]
    command += [str(arguments.threads), *["--jit"] * arguments.jit]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
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
    if arguments.model == "faster-rcnn":
        images = np.clip(128 + 50 * images, 0, 255)
    images = tf.constant(images)
    if arguments.memory_of:
        model = make(arguments.model, arguments.memory_of, images)
        for _ in range(3):
            calls_of(model, images, arguments.jit)["training step"]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    samplers = {}
    for kind in KINDS:
        model = make(arguments.model, kind, images)
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
