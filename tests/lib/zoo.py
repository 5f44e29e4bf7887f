# SPDX-License-Identifier: Apache-2.0
"""Makes well-known networks deformable: the table in `docs/surgery.md`.

    python tests/lib/zoo.py [NAME ...]

prints the rows of the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tf_deform

apps = keras.applications
SIZE = 160
RELOAD = """
import sys
import keras
import numpy as np
import tf_deform
folder = sys.argv[1]
model = keras.models.load_model(f"{folder}/model.keras", compile=False)
images = np.load(f"{folder}/images.npy")
outputs = keras.tree.flatten(model(images, training=False))
np.save(f"{folder}/outputs.npy", np.concatenate([np.ravel(v) for v in outputs]))
print(type(model).__name__)
"""


def app(name: str) -> Callable[[], keras.Model]:
    return lambda: getattr(apps, name)(
        weights=None, input_shape=(SIZE, SIZE, 3), include_top=False
    )


def hub(name: str) -> Any:
    """Returns a class of KerasHub, an extra of the tests."""
    return getattr(importlib.import_module("keras_hub").models, name)


def resnet() -> keras.Model:
    return hub("ResNetBackbone")(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        image_shape=(SIZE, SIZE, 3),
    )


def tiny_resnet() -> keras.Model:
    return hub("ResNetBackbone")(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 6, 8],
        stackwise_num_blocks=[1, 2, 1],
        stackwise_num_strides=[1, 2, 2],
        block_type="basic_block",
        image_shape=(64, 64, 3),
    )


def retinanet(
    encoder: Callable[[], keras.Model] = resnet, top: int = 5
) -> keras.Model:
    """Makes a detector on a network whose coarsest stride is `2 ** top`."""
    inner = encoder()
    backbone = hub("RetinaNetBackbone")(
        image_encoder=inner,
        min_level=3,
        max_level=top,
        use_p5=False,
        image_shape=inner.input_shape[1:],
    )
    return hub("RetinaNetObjectDetector")(
        backbone=backbone, num_classes=4, bounding_box_format="xyxy"
    )


def deeplab(
    encoder: Callable[[], keras.Model] = resnet, top: int = 5
) -> keras.Model:
    """Makes a segmenter on a network whose coarsest stride is `2 ** top`."""
    inner = encoder()
    backbone = hub("DeepLabV3Backbone")(
        image_encoder=inner,
        spatial_pyramid_pooling_key=f"P{top}",
        low_level_feature_key="P2",
        upsampling_size=2 ** (top - 2),
        dilation_rates=[6, 12, 18],
        image_shape=inner.input_shape[1:],
    )
    return hub("DeepLabV3ImageSegmenter")(backbone=backbone, num_classes=4)


def d_fine(size: int = SIZE, decoder_layers: int = 3) -> keras.Model:
    encoder = hub("HGNetV2Backbone")(
        depths=[1, 1, 2, 1],
        embedding_size=32,
        hidden_sizes=[64, 256, 512, 1024],
        stem_channels=[3, 16, 16],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[
            (16, 16, 64, 1, 3, 3),
            (64, 32, 256, 1, 3, 3),
            (256, 64, 512, 2, 3, 5),
            (512, 128, 1024, 1, 3, 5),
        ],
        apply_downsample=[False, True, True, True],
        use_lightweight_conv_block=[False, False, True, True],
        image_shape=(size, size, 3),
        out_features=["stage3", "stage4"],
    )
    return hub("DFineBackbone")(
        backbone=encoder,
        decoder_in_channels=[128, 128],
        encoder_hidden_dim=128,
        num_denoising=0,
        num_labels=4,
        hidden_dim=128,
        learn_initial_query=False,
        num_queries=30,
        anchor_image_size=(size, size),
        feat_strides=[16, 32],
        num_feature_levels=2,
        encoder_in_channels=[512, 1024],
        encode_proj_layers=[1],
        num_attention_heads=8,
        encoder_ffn_dim=512,
        num_encoder_layers=1,
        hidden_expansion=0.34,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=decoder_layers,
        decoder_attention_heads=8,
        decoder_ffn_dim=512,
        decoder_n_points=[6, 6],
        lqe_hidden_dim=64,
        num_lqe_layers=2,
        out_features=["stage3", "stage4"],
        image_shape=(size, size, 3),
        seed=0,
    )


MODELS: dict[str, Callable[[], keras.Model]] = {
    **{
        f"`keras.applications.{name}`": app(name)
        for name in (
            "ResNet50",
            "ResNet50V2",
            "ResNet101",
            "VGG16",
            "DenseNet121",
            "InceptionV3",
            "EfficientNetV2B0",
            "Xception",
        )
    },
    "KerasHub `ResNetBackbone`, 50 layers": resnet,
    "KerasHub `RetinaNetObjectDetector` on it": retinanet,
    "KerasHub `DeepLabV3ImageSegmenter` on it": deeplab,
    "KerasHub `DFineBackbone` on HGNetV2": d_fine,
}


# Xception has no other convolutions of several taps that are not separable.
OPTIONS = {"`keras.applications.Xception`": {"layers": "block1_conv"}}


@dataclasses.dataclass(frozen=True)
class Row:
    """Describes what became of a model.

    Attributes:
        layers: The number of layers changed.
        weights: The number of weights before and after.
        difference: The largest difference of outputs, over the largest output.
        moved: The least of the largest offset weights after two steps.
        reloaded: The largest difference of a file, in a new process.
        kind: The class of the model of the file.
    """

    layers: int
    weights: tuple[int, int]
    difference: float
    moved: float
    reloaded: float
    kind: str


def outputs_of(model: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    # Without `training`, Keras' Resizing, which DeepLabV3 has, makes all layers
    # behind it train: its own `training` is True where none is given.
    outputs = model(images, training=False)
    return [np.asarray(x) for x in keras.tree.flatten(outputs)]


def examine(name: str, folder: pathlib.Path) -> Row:
    """Makes a network deformable, trains it, writes it and reads it."""
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).normal(size=(1, SIZE, SIZE, 3))
    images = images.astype("float32")
    model = MODELS[name]()
    before = outputs_of(model, images)
    options = OPTIONS.get(name, {})
    report = tf_deform.make_deformable(model, verbose=False, **options)
    difference = max(
        np.abs(new - old).max() / max(np.abs(old).max(), 1e-30)
        for new, old in zip(outputs_of(model, images), before)
    )
    optimizer = keras.optimizers.SGD(1e-2, global_clipnorm=1.0)
    for _ in range(2):
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(model(images, training=True))
            loss = sum(
                tf.reduce_mean(tf.square(tf.cast(x, tf.float32)))
                for x in outputs
            )
        weights = model.trainable_variables
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        optimizer.apply(
            *zip(*((g, w) for g, w in zip(gradients, weights) if g is not None))
        )
    moved = min(
        np.abs(layer.offset_kernel.numpy()).max()
        for layer in tf_deform.deformable_layers(model)
    )
    np.save(folder / "images.npy", images)
    model.save(folder / "model.keras")
    head = "import keras_hub\n" if "KerasHub" in name else ""
    home = str(pathlib.Path(tf_deform.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", head + RELOAD, folder],
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    expected = np.concatenate([np.ravel(x) for x in outputs_of(model, images)])
    received = np.load(folder / "outputs.npy")
    return Row(
        len(report.changed),
        report.weights,
        float(difference),
        float(moved),
        float(np.abs(received - expected).max()),
        done.stdout.split()[-1],
    )


def line(name: str, row: Row) -> str:
    """Returns a row of the table."""
    before, after = (f"{weights / 1e6:.2f}" for weights in row.weights)
    return (
        f"| {name} | {row.layers} | {before} to {after} M | "
        f"{row.difference:.0e} | {row.reloaded:.0f} |"
    )


if __name__ == "__main__":
    for name in MODELS:
        if not sys.argv[1:] or any(x in name for x in sys.argv[1:]):
            with tempfile.TemporaryDirectory() as folder:
                row = examine(name, pathlib.Path(folder))
            print(line(name, row), row.moved, row.kind, flush=True)
