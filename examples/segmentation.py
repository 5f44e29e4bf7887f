# SPDX-License-Identifier: Apache-2.0
"""Trains a small segmentation model, plain and deformable, and compares them.

    python examples/segmentation.py --out runs/segmentation

It composes scenes of handwritten digits (see
`tf_deform/demo/_digit_scenes.py`), trains each
arm for the same number of steps on the same batches, and leaves in the folder:

    metrics.json        every number that was printed
    predictions.png     predictions beside the truth
    sampling.png        where the last two convolutions look
    saved_model/, saved_model_portable/, model.onnx, model.tflite
                        the deformable model, for serving (see `serve.py`)
    runs/               one folder per arm and seed

A call that was interrupted resumes when it is repeated: an arm that is done is
not trained again, and any other arm continues from its last complete epoch.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib

# TensorFlow's messages at start-up would bury the table.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import exports
import keras
import numpy as np
import pictures
import runs
import scipy.stats
import tensorflow as tf

import tf_deform
from tf_deform.demo import _digit_scenes as digit_scenes
from tf_deform.models._segmenter import Enlarge

ARMS = (
    "plain",
    "plain-wide",
    "plain-deep",
    "plain-dilated",
    "dcn-v1",
    "dcn-v2",
)

LEARNING_RATE = 0.016
# Nine of ten pixels are background: at full weight it would outweigh the
# digits.
BACKGROUND_WEIGHT = 0.5


def build_model(
    arm: str, image_size: int | None = digit_scenes.IMAGE_SIZE
) -> keras.Model:
    """Returns an untrained model of one arm.

    All arms have the same structure: two convolutions of stride 2, three more
    convolutions at a quarter of the size, a 1x1 score, bilinear enlargement.
    They differ in the last two convolutions alone, except "plain-wide", which
    has more filters, and "plain-deep", which has one convolution more.

    Args:
        arm: one of `ARMS`.
        image_size: height and width of the images in pixels, a multiple of 4;
            or None for images of any height and width that are multiples of 4.
            It has no part in the weights.

    Returns:
        A model from `(batch, height, width, 1)` uint8 gray values to
        `(batch, height, width, 11)` float32 logits.
    """
    # The wide arm has at least as many parameters as any deformable arm.
    narrow, wide = (28, 56) if arm == "plain-wide" else (24, 48)
    convolution = {
        "plain-dilated": functools.partial(
            keras.layers.Conv2D, dilation_rate=2
        ),
        "dcn-v1": tf_deform.layers.DeformableConv2D,
        "dcn-v2": functools.partial(
            tf_deform.layers.DeformableConv2D, modulation="2sigmoid"
        ),
    }.get(arm, keras.layers.Conv2D)

    def block(x, layer, filters, name, strides=1):
        x = layer(
            filters,
            3,
            strides=strides,
            padding="same",
            use_bias=False,
            name=name,
        )(x)
        return keras.layers.ReLU()(keras.layers.BatchNormalization()(x))

    inputs = keras.Input(
        (image_size, image_size, 1), dtype="uint8", name="image"
    )
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = block(x, keras.layers.Conv2D, narrow, "conv1", strides=2)
    x = block(x, keras.layers.Conv2D, wide, "conv2", strides=2)
    x = block(x, keras.layers.Conv2D, wide, "conv3")
    if arm == "plain-deep":
        x = block(x, keras.layers.Conv2D, wide, "conv3b")
    x = block(x, convolution, wide, "conv4")
    x = block(x, convolution, wide, "conv5")
    x = keras.layers.Conv2D(digit_scenes.NUM_CLASSES, 1, name="score")(x)
    enlarge = Enlarge if image_size is None else keras.layers.UpSampling2D
    x = enlarge(4, interpolation="bilinear")(x)
    return keras.Model(inputs, x, name=arm.replace("-", "_"))


def read_scenes(folder: pathlib.Path) -> tf.data.Dataset:
    """Returns the scenes of one part, decoded once and then kept in memory.

    Args:
        folder: folder with `images/*.png` and, of the same names,
            `masks/*.png`.

    Returns:
        A dataset of pairs of `(64, 64, 1)` uint8: gray values and classes.
    """
    images = sorted(str(path) for path in (folder / "images").glob("*.png"))
    masks = sorted(str(path) for path in (folder / "masks").glob("*.png"))
    return (
        tf.data.Dataset.from_tensor_slices((images, masks))
        .map(
            lambda image, mask: (runs.decode_png(image), runs.decode_png(mask)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .cache()
    )


def weigh(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Appends to a scene the weight of each pixel, shaped like `mask`."""
    background = tf.equal(tf.squeeze(mask, -1), 0)
    return image, mask, tf.where(background, BACKGROUND_WEIGHT, 1.0)


def mean_iou(model: keras.Model, scenes: tf.data.Dataset) -> float:
    """Returns the mean intersection over union of the 11 classes."""
    metric = keras.metrics.MeanIoU(
        digit_scenes.NUM_CLASSES, sparse_y_pred=False
    )
    for images, masks in scenes.batch(100):
        metric.update_state(masks, model(images, training=False))
    return float(metric.result())


def is_deformable(arm: str) -> bool:
    return arm.startswith("dcn")


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Returns pairs of every deformable arm with every other arm."""
    return [
        (arm, base)
        for arm, base in itertools.product(arms, arms)
        if is_deformable(arm) and not is_deformable(base)
    ]


def draw(
    models: dict[str, keras.Model],
    images: np.ndarray,
    masks: np.ndarray,
    annotations: list[dict],
    folder: pathlib.Path,
) -> None:
    """Draws the models' predictions and where the models sample.

    Args:
        models: models by name.
        images: `(batch, 64, 64, 1)` uint8, all scenes of a part.
        masks: `(batch, 64, 64, 1)` uint8, their classes.
        annotations: the part's COCO annotations.
        folder: receives `predictions.png` and `sampling.png`.
    """
    pictures.draw_predictions(
        folder / "predictions.png",
        images[:6],
        masks[:6],
        {
            name: model(images[:6], training=False).numpy().argmax(-1)
            for name, model in models.items()
        },
    )
    # Chooses six digits from small to large.
    by_size = sorted(annotations, key=lambda item: max(item["bbox"][2:]))
    ranks = np.linspace(0.1, 1, 6) * (len(by_size) - 1)
    chosen = [by_size[int(rank)] for rank in ranks]
    pictures.draw_sampling(
        folder / "sampling.png",
        images[[item["image_id"] for item in chosen]],
        [item["bbox"] for item in chosen],
        models,
        ("conv4", "conv5"),
    )


def follow_sizes(
    model: keras.Model, images: np.ndarray, annotations: list[dict]
) -> dict[str, float]:
    """Returns how closely a model's dilation follows the sizes of objects.

    It is Spearman's correlation of the effective dilation in a digit's box
    with the square root of the box's area, by deformable layer.

    Args:
        model: a model.
        images: `(batch, 64, 64, 1)` uint8, the first scenes of a part.
        annotations: the part's COCO annotations.
    """
    boxes = np.array(
        [
            (item["image_id"], x, y, x + width, y + height)
            for item in annotations
            if item["image_id"] < len(images)
            for x, y, width, height in [item["bbox"]]
        ]
    )
    sizes = np.sqrt((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2]))
    return {
        layer.name: float(
            scipy.stats.spearmanr(
                tf_deform.visualization.effective_dilation(
                    model, layer, images, boxes
                ),
                sizes,
                nan_policy="omit",
            ).statistic
        )
        for layer in tf_deform.deformable_layers(model)
    }


def run(
    args: argparse.Namespace, folders: dict[tuple[str, int], pathlib.Path]
) -> None:
    """Trains, compares, draws and exports."""
    training = read_scenes(args.data / "train")
    held_out = read_scenes(args.data / args.part)
    results = [
        runs.train(
            arm,
            seed,
            args.steps,
            args.epoch_steps,
            folder,
            build_model,
            LEARNING_RATE,
            lambda start, seed=seed: runs.stream(training, seed, start).map(
                weigh, num_parallel_calls=tf.data.AUTOTUNE
            ),
            lambda model: {"miou": mean_iou(model, held_out)},
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        for (arm, seed), folder in folders.items()
    ]
    compared = runs.differences(results, "miou", pairs(args.arms))
    table = runs.report(results, {"miou": "mIoU"}, compared, args.part)
    print("\n" + table, flush=True)

    # Draws one plain model, or else the first one, beside the most deformable
    # one.
    models = {
        arm: keras.saving.load_model(
            folders[arm, args.seeds[0]] / "model.keras", compile=False
        )
        for arm in dict.fromkeys((args.arms[0], args.arms[-1]))
    }
    images, masks = (
        array.numpy()
        for array in held_out.batch(len(held_out)).get_single_element()
    )
    coco = json.loads((args.data / args.part / "instances.json").read_text())
    draw(models, images, masks, coco["annotations"], args.out)
    followed = follow_sizes(
        models[args.arms[-1]], images[:300], coco["annotations"]
    )
    for name, value in followed.items():
        print(
            f"\n{args.arms[-1]}, {name}: Spearman's correlation of its "
            f"effective dilation with the sizes of digits is {value:.2f}"
        )
    exported = exports.export_all(
        models[args.arms[-1]], images[:100], args.out, args.formats
    )
    print(
        f"\n{args.arms[-1]} exported; differences of logits, relative to the "
        f"largest:\n\n{exports.report(exported)}"
    )
    runs.write_metrics(
        args, results, compared, exports=exported, follows_sizes=followed
    )
    written = ["metrics.json", "predictions.png", "sampling.png", *exported]
    print(f"\nWritten to {args.out}: {', '.join(written)}")


def main() -> None:
    args = runs.parse_arguments(
        "Compare a plain segmentation model with its deformable twin.",
        ARMS,
        ("plain", "dcn-v2"),
        steps=800,
        out="runs/segmentation",
    )
    runs.main(args, run)


if __name__ == "__main__":
    main()
