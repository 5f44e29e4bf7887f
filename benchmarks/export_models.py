# SPDX-License-Identifier: Apache-2.0
"""Makes the models of `export_table.py`, and writes their files."""

import os
import pathlib
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two processes run at a time, with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]

MODELS = {
    "segmenter": "segmenter",
    "detector": "detector",
    "resnet": "ResNet-50, 13 deformable layers",
    "recurrent": "recurrent alignment",
    "conditional": "conditional",
}
# Maps each format to its file or folder. Keras requires these endings.
FILES = {
    "native": "native",
    "portable": "portable",
    "keras-saved-model": "keras_saved_model",
    "keras-onnx": "keras.onnx",
    "keras-openvino": "keras.xml",
    "keras-litert": "keras.tflite",
    "keras-torch": "keras.pt2",
    "onnx19": "opset19.onnx",
    "onnx22": "opset22.onnx",
    "litert": "float32.tflite",
    "litert-float16": "float16.tflite",
    "litert-dynamic": "dynamic.tflite",
    "litert-int8": "int8.tflite",
    "tfjs": "tfjs",
}

# Holds, for each call, the inputs or the outputs by name.
Cases = list[dict[str, np.ndarray]]


def displace(layer: Any, size: float = 1.0) -> None:
    """Gives a layer's branch weights that move samples by 1 to 2 pixels.

    Args:
        layer: a layer of this package.
        size: root mean square of the branch's inputs.
    """
    kernel, bias = layer.offset_kernel, layer.offset_bias
    rng = np.random.default_rng(len(layer.name))
    scale = 1 / (size * np.sqrt(np.prod(kernel.shape[:-1])))
    kernel.assign(rng.normal(size=kernel.shape) * scale)
    bias.assign(rng.normal(size=bias.shape))


def displace_all(model: Any, images: np.ndarray) -> None:
    """Displaces a model's convolutions, from the first to the last."""
    import keras

    import tf_deform

    for layer in model.layers:
        if isinstance(layer, tf_deform.layers.DeformableConv2D):
            before = keras.Model(model.inputs, layer.input)
            seen = np.asarray(before(images))
            displace(layer, float(np.sqrt(np.mean(seen**2))) + 1e-6)


def make_segmenter() -> tuple[Any, Any, Cases]:
    from tf_deform.demo import _digit_models

    model = _digit_models.build_segmenter("dcn-v2", 0)
    images = make_scenes()
    displace_all(model.backbone, images)
    return model, model, [{"image": images}]


def make_detector() -> tuple[Any, Any, Cases]:
    """Returns a functional model around the detector, and the detector."""
    import keras

    from tf_deform.demo import _digit_models

    model = _digit_models.build_detector("both", 0)
    images = make_scenes()
    displace_all(model.backbone, images)
    for pooling in model.poolings:
        displace(pooling)
    # Spreads the scores far enough apart that rounding does not reorder them.
    for name in ("rpn_objectness", "features", "score_maps"):
        layer = model.trunk.get_layer(name)
        layer.kernel.assign(layer.kernel * 100)
        layer.bias.assign(0 * layer.bias)  # The prior of classes is low.
    inputs = keras.Input(images.shape[1:], name="image")
    network = keras.Model(inputs, model(inputs))
    return network, model, [{"image": images}]


def make_scenes() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 64, 64, 3)).astype("float32")


def make_resnet() -> tuple[Any, Any, Cases]:
    import resnet

    images = np.random.default_rng(0).normal(size=(1, 128, 128, 3))
    images = images.astype("float32")
    model = resnet.make_twin(resnet.make_plain(128))
    assert resnet.count_deformable(model) == resnet.NUM_LAYERS
    displace_all(model, images)
    return model, model, [{model.inputs[0].name: images}]


def make_recurrent() -> tuple[Any, Any, Cases]:
    """Returns a model that aligns its state to each frame by deforming it."""
    import keras
    import tensorflow as tf

    import tf_deform

    class Alignment(keras.layers.Layer):
        def build(self, shape):
            self.encode = keras.layers.Conv2D(8, 3, padding="same")
            self.align = tf_deform.layers.DeformableConv2D(
                8, 3, padding="same", modulation="sigmoid"
            )
            self.encode.build((None, *shape[2:]))
            self.align.build((None, *shape[2:4], 8))
            displace(self.align, 0.5)

        def compute_output_shape(self, shape):
            return (*shape[:4], 8)

        def call(self, frames):
            frames = tf.transpose(frames, (1, 0, 2, 3, 4))
            states = tf.scan(
                lambda state, frame: tf.tanh(
                    self.encode(frame) + self.align(state)
                ),
                frames,
                tf.zeros((tf.shape(frames)[1], *frames.shape[2:4], 8)),
            )
            return tf.transpose(states, (1, 0, 2, 3, 4))

    inputs = keras.Input((4, 12, 14, 3), name="frames")
    model = keras.Model(inputs, Alignment()(inputs))
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(2, 4, 12, 14, 3)).astype("float32")
    return model, model, [{"frames": frames}]


def make_conditional() -> tuple[Any, Any, Cases]:
    """Returns a model that is deformable or plain, as an input says."""
    import keras

    import tf_deform

    class Choice(keras.layers.Layer):
        def build(self, shape):
            self.deformable, self.plain = (
                layer(8, 3, padding="same")
                for layer in (
                    tf_deform.layers.DeformableConv2D,
                    keras.layers.Conv2D,
                )
            )
            self.deformable.build(shape)
            self.plain.build(shape)
            displace(self.deformable)

        def compute_output_shape(self, shape):
            return (*shape[:-1], 8)

        def call(self, inputs):
            return keras.ops.cond(
                keras.ops.mean(inputs) > 0,
                lambda: self.deformable(inputs),
                lambda: self.plain(inputs),
            )

    inputs = keras.Input((12, 14, 3), name="image")
    model = keras.Model(inputs, Choice()(inputs))
    image = np.random.default_rng(0).normal(size=(2, 12, 14, 3))
    cases = [(image + shift).astype("float32") for shift in (0.5, -0.5)]
    return model, model, [{"image": image} for image in cases]


def make(name: str, folder: pathlib.Path) -> tuple[Any, Any, Cases]:
    """Returns a model, the part of it that is exported, and inputs.

    The first call writes weights, inputs and outputs to the folder; all later
    calls read the weights.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model, source, cases = globals()[f"make_{name}"]()
    weights = folder / "weights.npz"
    if weights.exists():
        values = np.load(weights)
        model.set_weights([values[str(i)] for i in range(len(values))])
        return model, source, cases
    for whose, run in (("keras", model), ("export", source)):
        for i, given in enumerate(cases):
            (value,) = given.values()
            outputs = keras.tree.flatten_with_path(run(tf.constant(value)))
            outputs = {
                "_".join(map(str, path)) or "output_0": np.asarray(array)
                for path, array in outputs
            }
            np.savez(folder / f"{whose}_{i}.npz", **outputs)
    np.savez(
        folder / "cases.npz",
        **{
            f"{i}/{name}": value
            for i, given in enumerate(cases)
            for name, value in given.items()
        },
    )
    values = model.get_weights()
    np.savez(weights, **{str(i): value for i, value in enumerate(values)})
    return model, source, cases


def write(name: str, format_: str, folder: pathlib.Path) -> None:
    """Writes one file, after the weights if there are none yet."""
    model, source, cases = make(name, folder)
    if format_ == "weights":
        return
    from tf_deform import export

    path = folder / FILES[format_]
    (value,) = cases[0].values()
    kind, _, option = format_.partition("-")
    if kind == "keras":
        model(value)  # Keras' export to ONNX needs a model that was called.
        formats = {"saved-model": "tf_saved_model"}
        model.export(str(path), format=formats.get(option, option))
        return
    arguments: dict[str, Any] = {"sample": [value], "verbose": False}
    if kind in ("native", "portable"):
        export.saved_model(source, path, kind, **arguments)
    elif kind.startswith("onnx"):
        export.onnx(source, path, int(kind.removeprefix("onnx")), **arguments)
    else:
        if option:
            # Allows any difference: the table shows it.
            arguments |= {"quantize": option, "tolerance": 1e9}
        if option == "int8":
            given = [value for case in cases for value in case.values()]
            arguments["calibration"] = [value[:1] for value in given] * 4
        export.litert(source, path, **arguments)
