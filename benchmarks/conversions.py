# SPDX-License-Identifier: Apache-2.0
"""Measures the effect of later conversions of ONNX files on deformable layers.

    python benchmarks/conversions.py

Writes small models with `tf_deform.export`, converts the files with other
programs, and prints how far the outputs of these files are from the model's:
the largest difference, and the root of the mean square, in percent of the
largest number. Leaves out conversions whose package is not installed: nncf and
onnxconverter-common are no part of `pip install 'tf-deform[test]'`.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import openvino  # noqa: E402
import report  # noqa: E402
import tensorflow as tf  # noqa: E402
from onnxruntime import quantization  # noqa: E402
from onnxruntime.transformers import float16  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import openvino_extension  # noqa: E402

import tf_deform  # noqa: E402
from tf_deform import export  # noqa: E402

# Takes arrays by name; returns the first output.
Run = Callable[[dict[str, np.ndarray]], np.ndarray]
Inputs = dict[str, np.ndarray]
# Nodes that compute positions, and read there, have this word in their names.
DEFORMABLE = "deformable"


def make_model(kind: str) -> keras.Model:
    """Returns three convolutions and a kind of deformable layer."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3), name="image")
    inputs, x = [image], image
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(
            x
        )
    if kind in ("zeros", "clamp"):
        for index in range(2):
            x = tf_deform.layers.DeformableConv2D(
                32,
                3,
                padding="same",
                boundary=kind,
                modulation="2sigmoid",
                name=f"{DEFORMABLE}_{index}",
            )(x)
        x = keras.layers.Conv2D(8, 1)(x)
    else:
        rois = keras.Input((5,), name="rois")
        inputs.append(rois)
        x = tf_deform.layers.DeformableROIAlign(
            7, 1.0, name=f"{DEFORMABLE}_pooling"
        )(x, rois)
        x = keras.layers.Conv2D(8, 1)(x)
    model = keras.Model(inputs, x)
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.05))
    return model


def make_inputs(kind: str, size: int, seed: int = 0) -> Inputs:
    """Returns two smooth images, and regions if the model takes them."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(size=(2, size // 4, size // 4, 3)).astype("float32")
    images = tf.image.resize(pixels, (size, size)).numpy()
    if kind != "roi":
        return {"image": images}
    corners = np.sort(rng.uniform(0, size, (32, 2, 2)), axis=1).reshape(32, 4)
    index = np.arange(32)[:, None] % 2
    rois = np.concatenate([index, corners], axis=1).astype("float32")
    return {"image": images, "rois": rois}


class Calibration(quantization.CalibrationDataReader):
    """Yields inputs by which a converter chooses its ranges."""

    def __init__(self, kind: str, size: int):
        self.batches = iter(
            [make_inputs(kind, size, seed) for seed in range(1, 7)]
        )

    def get_next(self) -> Inputs | None:
        return next(self.batches, None)


def run_onnxruntime(path: pathlib.Path) -> Run:
    session = onnxruntime.InferenceSession(path)
    return lambda inputs: session.run(None, inputs)[0]


def run_openvino(path: pathlib.Path, precision: str | None) -> Run:
    core = openvino.Core()
    core.add_extension(openvino_extension.deform_conv())
    options = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    compiled = core.compile_model(path, "CPU", options)
    return lambda inputs: compiled(inputs)[0]


def layers_nodes(proto: onnx.ModelProto) -> list[str]:
    """Returns the nodes of deformable layers, their branches included."""
    return [node.name for node in proto.graph.node if DEFORMABLE in node.name]


def has_vnni() -> bool:
    """Tells whether the processor adds products of 8 bits without overflow.

    Else ONNX Runtime needs weights of 7 bits.
    """
    flags = re.search(
        "^flags.*$", pathlib.Path("/proc/cpuinfo").read_text(), re.M
    )
    return "vnni" in flags[0]


def convert(
    kind: str, size: int, folder: pathlib.Path
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yields each conversion's name, and a function that converts and loads."""
    model = make_model(kind)
    source, portable = folder / "model.onnx", folder / "portable"
    target = folder / "converted.onnx"
    sample = make_inputs(kind, 64)
    export.onnx(model, source, sample=sample, verbose=False)
    proto = onnx.load(source)
    nodes = layers_nodes(proto)

    def run_portable(precision: str | None) -> Run:
        export.saved_model(
            model, portable, "portable", sample=sample, verbose=False
        )
        return run_openvino(portable, precision)

    yield "ONNX Runtime", lambda: run_onnxruntime(source)
    yield "OpenVINO, f32", lambda: run_openvino(source, "f32")
    yield "OpenVINO, its default", lambda: run_openvino(source, None)
    yield (
        "OpenVINO, portable SavedModel, f32",
        lambda: run_portable("f32"),
    )
    yield (
        "OpenVINO, portable SavedModel, its default",
        lambda: run_portable(None),
    )

    def save_openvino() -> Run:
        core = openvino.Core()
        core.add_extension(openvino_extension.deform_conv())
        saved = folder / "model.xml"
        openvino.save_model(core.read_model(source), saved)
        return run_openvino(saved, "f32")

    yield "openvino.save_model (weights in float16), f32", save_openvino

    def quantize_dynamic() -> Run:
        quantization.quantize_dynamic(
            source, target, reduce_range=not has_vnni()
        )
        return run_onnxruntime(target)

    yield "quantize_dynamic", quantize_dynamic

    def quantize_static(**options) -> Run:
        quantization.quantize_static(
            source,
            target,
            Calibration(kind, size),
            reduce_range=not has_vnni(),
            **options,
        )
        return run_onnxruntime(target)

    yield "quantize_static", quantize_static
    yield (
        'quantize_static(op_types_to_quantize=["Conv"])',
        lambda: quantize_static(op_types_to_quantize=["Conv"]),
    )
    yield (
        "quantize_static(nodes_to_exclude=nodes)",
        lambda: quantize_static(nodes_to_exclude=nodes),
    )

    def to_float16(module=float16, **options) -> Run:
        converted = module.convert_float_to_float16(
            onnx.load(source), keep_io_types=True, **options
        )
        onnx.save(converted, target)
        return run_onnxruntime(target)

    yield "convert_float_to_float16", to_float16
    yield (
        "convert_float_to_float16(node_block_list=nodes)",
        lambda: to_float16(node_block_list=nodes),
    )
    try:
        from onnxconverter_common import float16 as common
    except ImportError:
        pass
    else:
        yield (
            "convert_float_to_float16 of onnxconverter-common",
            lambda: to_float16(common),
        )
        yield (
            "the same, node_block_list=nodes",
            lambda: to_float16(common, node_block_list=nodes),
        )
    yield from convert_with_nncf(kind, size, source, target)


def convert_with_nncf(
    kind: str, size: int, source: pathlib.Path, target: pathlib.Path
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yields names and conversions by nncf, if it is installed."""
    try:
        import nncf
    except ImportError:
        return
    nodes = layers_nodes(onnx.load(source))

    def quantize_nncf(**options) -> Run:
        batches = [make_inputs(kind, size, seed) for seed in range(1, 7)]
        found = nncf.quantize(
            onnx.load(source), nncf.Dataset(batches), **options
        )
        onnx.save(found, target)
        return run_onnxruntime(target)

    yield "nncf.quantize", quantize_nncf
    yield (
        "nncf.quantize(ignored_scope=nodes)",
        lambda: quantize_nncf(ignored_scope=nncf.IgnoredScope(names=nodes)),
    )


def measure(received: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Returns the largest difference and the root mean square, in percent.

    Both are relative to the largest expected number.
    """
    delta = 100 * np.abs(received - expected) / np.abs(expected).max()
    return float(delta.max()), float(np.sqrt(np.mean(np.square(delta))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--kinds", nargs="+", default=["zeros", "clamp", "roi"])
    arguments = parser.parse_args()
    table: dict[str, list[str]] = {}
    columns = []
    for kind in arguments.kinds:
        for size in arguments.sizes:
            columns.append(f"{kind}, {size} px")
            inputs = make_inputs(kind, size)
            expected = make_model(kind)(inputs, training=False).numpy()
            with tempfile.TemporaryDirectory() as folder:
                for name, load in convert(kind, size, pathlib.Path(folder)):
                    try:
                        largest, mean = measure(load()(inputs), expected)
                        cell = f"{largest:.2g} ({mean:.2g})"
                    except Exception as error:
                        print(f"{columns[-1]}: {name}: {error}", flush=True)
                        cell = "fails"
                    table.setdefault(name, []).append(cell)
                    print(columns[-1], name, cell, flush=True)
    rows = [[name, *cells] for name, cells in table.items()]
    print(f"\n{report.markdown(['', *columns], rows, words=1)}")


if __name__ == "__main__":
    main()
