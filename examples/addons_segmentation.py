# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Keras 2 model with tensorflow_addons, plain and deformable.

    python examples/addons_segmentation.py --out runs/addons

For TensorFlow 2.15, the last that tensorflow_addons runs with. A small plain
model learns to segment scenes of handwritten digits (see
`tf_deform/demo/_digit_scenes.py`).
Then two copies of it are fine-tuned for the same number of steps on the same
batches: one stays plain, in the other the last two convolutions become
deformable and start with the plain weights. In the folder the call leaves

    metrics.json                 every number that was printed
    plain.keras, deformable.keras   both models
    saved_model/                 the deformable model, for serving

From tensorflow_addons come the focal loss, GroupNormalization, AdamW and the
augmentation. Each has a trap, which a comment below names.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

# TensorFlow's messages at start-up would bury the table.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import tf_deform
from tf_deform.demo import _digit_scenes as digit_scenes

try:
    import tensorflow_addons as tfa
except ImportError as error:
    raise ImportError(
        "Expected tensorflow_addons, whose last release, 0.23, runs with "
        "TensorFlow 2.15 and Python 3.9 to 3.11: it imports parts of Keras 2 "
        f"that are gone since. Received: TensorFlow {tf.__version__}, Python "
        f"{sys.version.split()[0]}, and the error {error!r}. Run "
        "`pip install 'tf-deform[addons]' 'tensorflow==2.15.*'` in an "
        "environment of its own"
    ) from error

keras = tf.keras

BATCH = 16
RATE = 0.002
NUM_CLASSES = digit_scenes.NUM_CLASSES
# Served in a process of its own, which imports no Keras model.
SERVE = """
import sys
import numpy as np
import tensorflow as tf
import tf_deform
images = np.load(sys.argv[2])
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
np.save(sys.argv[3], next(iter(serve(tf.constant(images)).values())))
"""


def build_model(deformable: bool, image_size: int = digit_scenes.IMAGE_SIZE):
    """Returns an untrained model.

    Args:
        deformable: Whether the last two convolutions are deformable. Layers
            have the same names in either case.
        image_size: Height and width of the images, a multiple of 4.

    Returns:
        A model from `(batch, height, width, 1)` uint8 gray values to
        `(batch, height, width, 11)` float32 logits.
    """

    def block(x, name, filters, strides=1, **kwargs):
        layer = keras.layers.Conv2D
        if kwargs:
            layer = tf_deform.layers.DeformableConv2D
        x = layer(
            filters,
            3,
            strides=strides,
            padding="same",
            use_bias=False,
            name=name,
            **kwargs,
        )(x)
        # In float16 both tensorflow_addons' and Keras 2's GroupNormalization
        # return zeros where activations are large, and no gradient.
        x = tfa.layers.GroupNormalization(
            8, dtype="float32", name=f"{name}_norm"
        )(x)
        return keras.layers.ReLU()(x)

    deformed = {"modulation": "2sigmoid"} if deformable else {}
    inputs = keras.Input((image_size, image_size, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = block(x, "conv1", 24, strides=2)
    x = block(x, "conv2", 48, strides=2)
    x = block(x, "conv3", 48)
    x = block(x, "conv4", 48, **deformed)
    x = block(x, "conv5", 48, **deformed)
    # A focal loss learns faster from scores that say at first how rare each
    # class is: most pixels are background.
    rare = keras.initializers.Constant([2.0] + [-4.0] * (NUM_CLASSES - 1))
    x = keras.layers.Conv2D(
        NUM_CLASSES, 1, bias_initializer=rare, dtype="float32", name="score"
    )(x)
    x = keras.layers.UpSampling2D(4, interpolation="bilinear", dtype="float32")(
        x
    )
    return keras.Model(inputs, x)


def make_optimizer(rate: float, steps: int):
    """Returns AdamW whose rate and decay fall to 0, with slower offsets."""
    schedule = keras.optimizers.schedules.CosineDecay
    return tf_deform.training.deformable_optimizer(
        tfa.optimizers.AdamW(
            # Is not multiplied by the rate, unlike Keras' `weight_decay`: the
            # decay of Keras' AdamW(rate, weight_decay=0.01) is this.
            weight_decay=schedule(0.01 * rate, steps),
            learning_rate=schedule(rate, steps),
            exclude_from_weight_decay=["offset_", "gamma", "beta", "bias"],
        ),
        offset_multiplier=0.3,
    )


def read_scenes(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and the masks of one part, `(count, 64, 64, 1)`."""

    def read(kind):
        paths = sorted((folder / kind).glob("*.png"))
        return np.stack(
            [tf.io.decode_png(tf.io.read_file(str(path)), 1) for path in paths]
        )

    return read("images"), read("masks")


def augment(images: tf.Tensor, masks: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Turns and shifts scenes and their masks alike."""
    count = tf.shape(images)[0]
    angles = tf.random.uniform((count,), -0.3, 0.3)
    shifts = tf.random.uniform((count, 2), -4.0, 4.0)

    def move(maps, interpolation):
        how = {"interpolation": interpolation, "fill_mode": "reflect"}
        return tfa.image.translate(
            tfa.image.rotate(maps, angles, **how), shifts, **how
        )

    # Classes must not be mixed, which "bilinear" would do.
    return move(images, "bilinear"), move(masks, "nearest")


def batches(images: np.ndarray, masks: np.ndarray, seed: int):
    """Returns an endless dataset of augmented batches, with targets."""

    def to_targets(images, masks):
        return images, tf.one_hot(masks[..., 0], NUM_CLASSES)

    return (
        tf.data.Dataset.from_tensor_slices((images, masks))
        .repeat()
        .shuffle(1000, seed=seed)
        .batch(BATCH)
        .map(augment, num_parallel_calls=tf.data.AUTOTUNE)
        .map(to_targets, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(2)
    )


def train(model, data: tf.data.Dataset, rate: float, steps: int) -> float:
    """Trains a model, and returns the seconds that it took."""
    # By itself the focal loss of tensorflow_addons returns a number for each
    # pixel, whose gradients Keras would add: steps would grow with the images.
    loss = tfa.losses.SigmoidFocalCrossEntropy(
        from_logits=True,
        alpha=0.5,
        gamma=1.0,
        reduction="sum_over_batch_size",
    )
    model.compile(make_optimizer(rate, steps), loss)
    start = time.monotonic()
    model.fit(data, steps_per_epoch=steps, verbose=2)
    return time.monotonic() - start


def mean_iou(model, images: np.ndarray, masks: np.ndarray) -> float:
    """Returns the mean intersection over union of the 11 classes."""
    metric = keras.metrics.MeanIoU(NUM_CLASSES, sparse_y_pred=False)
    metric.update_state(masks, model.predict(images, verbose=0))
    return float(metric.result())


def serve(model, images: np.ndarray, folder: pathlib.Path) -> float:
    """Exports a model and runs it in a fresh process.

    Returns:
        The largest difference from the model's output here, relative to the
        largest number.
    """
    path = folder / "saved_model"
    tf_deform.export.saved_model(model, path, sample=images, verbose=False)
    np.save(folder / "images.npy", images)
    files = [path, folder / "images.npy", folder / "logits.npy"]
    subprocess.run([sys.executable, "-c", SERVE, *map(str, files)], check=True)
    expected = model.predict(images, verbose=0)
    got = np.load(folder / "logits.npy")
    for file in files[1:]:
        file.unlink()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def run(args: argparse.Namespace) -> dict[str, float]:
    """Trains, fine-tunes, compares, saves and serves; returns the numbers."""
    scenes = digit_scenes.write(
        args.out / "scenes", train=args.scenes, val=10, test=args.scenes // 4
    )
    training = read_scenes(scenes / "train")
    held_out = read_scenes(scenes / "test")
    keras.mixed_precision.set_global_policy(args.policy)
    keras.utils.set_random_seed(args.seed)
    print("Training the plain model", flush=True)
    model = build_model(deformable=False)
    data = batches(*training, args.seed)
    numbers = {"seconds": train(model, data, RATE, args.steps)}
    numbers["miou"] = mean_iou(model, *held_out)
    before = args.out / "before.weights.h5"
    model.save_weights(before)

    results = {"before": numbers}
    for name in ("plain", "deformable"):
        print(f"Fine-tuning, {name}", flush=True)
        keras.utils.set_random_seed(args.seed + 1)
        model = build_model(deformable=name == "deformable")
        tf_deform.load_plain_weights(model, before)
        data = batches(*training, args.seed + 1)
        numbers = {"seconds": train(model, data, RATE, args.steps)}
        numbers["miou"] = mean_iou(model, *held_out)
        model.save(args.out / f"{name}.keras")
        results[name] = numbers
    results["served"] = {"difference": serve(model, held_out[0][:8], args.out)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fine-tune with tensorflow_addons, plain and deformable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, default="runs/addons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument(
        "--policy", default="float32", help="e.g. mixed_float16"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on a few scenes"
    )
    args = parser.parse_args()
    if args.quick:
        args.scenes, args.steps = 40, 4
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(args)
    print("\n| model | mIoU | training |\n|---|---:|---:|")
    for name in ("before", "plain", "deformable"):
        numbers = results[name]
        print(
            f"| {name} | {numbers['miou']:.3f} | {numbers['seconds']:.0f} s |"
        )
    print(
        "\nThe served model's largest difference: "
        f"{results['served']['difference']:.1e}"
    )
    results["arguments"] = {
        key: str(value) for key, value in vars(args).items()
    }
    (args.out / "metrics.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
