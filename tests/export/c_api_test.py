# SPDX-License-Identifier: Apache-2.0
"""Tests exported models in a C program, serve.c, without Python."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from operands import random
from tensorflow.core.protobuf import saved_model_pb2

from tf_deform import _loader
from tf_deform.export import saved_model
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

COMPILER = shlex.split(os.environ.get("CC", "cc"))
pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None,
    reason=f"needs a C compiler: {COMPILER[0]}",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> pathlib.Path:
    """Builds tests/export/serve.c against the installed TensorFlow."""
    program = tmp_path_factory.mktemp("program") / "serve"
    libraries = tf.sysconfig.get_lib()
    result = subprocess.run(
        [
            *COMPILER,
            *("-std=c99", "-pedantic", "-Wall", "-Wextra", "-O1"),
            f"-isystem{tf.sysconfig.get_include()}",
            str(pathlib.Path(__file__).with_name("serve.c")),
            f"-L{libraries}",
            f"-Wl,-rpath,{libraries}",
            "-l:libtensorflow_cc.so.2",
            "-l:libtensorflow_framework.so.2",
            *("-o", str(program)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return program


def serve(program, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *arguments], capture_output=True, timeout=300, check=False
    )


ROIS = np.float32([[0, 1, 2, 9, 12], [1, 4, 0, 14, 7], [-1, 0, 0, 9, 9]])


def one_layer():
    image = keras.Input((11, 13, 6), name="image")
    x = DeformableConv2D(10, 3, strides=2, padding="same")(image)
    return keras.Model(image, x), [random(3, 11, 13, 6)]


def any_size():
    """Makes a model in half precision that knows only its channels."""
    image = keras.Input((6, None, None), name="image")
    x = DeformableConv2D(
        10,
        3,
        data_format="channels_first",
        modulation="sigmoid",
        offset_groups=2,
        dtype="mixed_bfloat16",
    )(image)
    return keras.Model(image, x), [random(2, 6, 9, 14)]


def segmenter():
    """Makes a model like the demo's.

    It normalises images of bytes and returns scores of pixels.
    """

    def block(x, layer, filters, **kwargs):
        x = layer(filters, 3, padding="same", use_bias=False, **kwargs)(x)
        return keras.layers.ReLU()(keras.layers.BatchNormalization()(x))

    image = keras.Input((32, 32, 1), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(image)
    x = block(x, keras.layers.Conv2D, 24, strides=2)
    x = block(x, DeformableConv2D, 40, modulation="2sigmoid")
    x = block(x, DeformableConv2D, 40, modulation="2sigmoid")
    x = keras.layers.Conv2D(11, 1)(x)
    x = keras.layers.UpSampling2D(2, interpolation="bilinear")(x)
    values = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1))
    return keras.Model(image, x), [values.astype(np.uint8)]


def pooling(layer):
    def make():
        image = keras.Input((15, 16, 8), name="image")
        rois = keras.Input((5,), name="rois")
        model = keras.Model([image, rois], layer(image, rois))
        return model, [random(2, 15, 16, 8), ROIS]

    return make


MODELS = {
    "one_layer": one_layer,
    "any_size": any_size,
    "segmenter": segmenter,
    "DeformablePSROIPooling": pooling(
        lambda image, rois: DeformablePSROIPooling(2, 2, 1.0)(
            image, rois, trans_inputs=image
        )
    ),
    "DeformableROIPooling": pooling(DeformableROIPooling(3, 1.0)),
    "DeformableROIAlign": pooling(DeformableROIAlign((3, 2), 1.0)),
}


@dataclasses.dataclass
class Exported:
    """Holds a model on disk, and the arguments with which `serve` runs it."""

    folder: pathlib.Path
    output: str  # the tensor's name in the signature
    inputs: list[str]
    expected: np.ndarray


def export(name: str, folder: pathlib.Path) -> Exported:
    keras.utils.set_random_seed(0)
    model, arrays = MODELS[name]()
    for seed, variable in enumerate(model.weights):
        # No weight stays at zero; variances stay positive.
        noise = 0.1 * random(*variable.shape, seed=seed)
        variable.assign(np.abs(noise + variable.numpy()))
    saved_model(model, folder / name, sample=arrays, verbose=False)
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / name / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    inputs = []
    for tensor, array in zip(model.inputs, arrays, strict=True):
        file = folder / f"{name}_{tensor.name}.raw"
        array.tofile(file)
        shape = "x".join(map(str, array.shape))
        key = signature.inputs[tensor.name].name
        inputs.append(f"{key}={array.dtype}:{shape}:{file}")
    (output,) = (info.name for info in signature.outputs.values())
    arrays = arrays if len(arrays) > 1 else arrays[0]
    return Exported(folder / name, output, inputs, model(arrays).numpy())


@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_same_as_in_python(name, program, tmp_path):
    model = export(name, tmp_path)
    result = serve(
        program, _loader.LIBRARY, model.folder, model.output, *model.inputs
    )
    assert result.returncode == 0, result.stderr.decode()
    assert np.any(tf.cast(model.expected, tf.float32))
    assert result.stdout == model.expected.tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Exported:
    return export("one_layer", tmp_path_factory.mktemp("model"))


def test_without_the_library(program, model):
    """Tests the error. It names an op whose name tells what is missing."""
    result = serve(program, "-", model.folder, model.output, *model.inputs)
    assert result.returncode == 1
    assert result.stdout == b""
    text = result.stderr.decode().splitlines()[-1]
    assert text.startswith(
        "TF_LoadSessionFromSavedModel: Op type not registered "
        "'TfDeform>ImportTfDeformOrLoadItsOpLibrary'"
    )


def test_another_path(program, model, tmp_path):
    library = tmp_path / "_ops.so"
    result = serve(program, library, model.folder, model.output, *model.inputs)
    assert result.returncode == 1
    assert result.stdout == b""
    text = result.stderr.decode().splitlines()[-1]
    assert text.startswith(f"TF_LoadLibrary: {library}: ")


@pytest.mark.parametrize(
    ("code", "argument", "text"),
    [
        (2, "x", "Expected INPUT=DTYPE:SHAPE:FILE. Received: x"),
        (2, "x:0=int8", "Expected DTYPE:SHAPE:FILE. Received: int8"),
        (2, "x:0=int3:1:file", "Expected a DTYPE like float32. Received: int3"),
        (2, "x:0=int32:1,2:file", "Expected a SHAPE like 2x32x48. Received: 1"),
        (2, "x:0=int32:-1:file", "Expected a number of 0 or more. Received: -"),
        (1, "x:0=int32:1:/nowhere/file", "/nowhere/file: No such file"),
        (1, f"x:0=uint8:7:{__file__}", f"Expected 7 bytes in {__file__}. "),
        (1, "x:0=uint8:0:/dev/null", "Expected a tensor of the graph. "),
        (1, "serving_default_image:1=uint8:0:/dev/null", "Expected a tensor "),
        (1, "serving_default_image:0=uint8:0:/dev/null", "TF_SessionRun: "),
    ],
)
def test_bad_arguments(code, argument, text, program, model):
    result = serve(
        program, _loader.LIBRARY, model.folder, model.output, argument
    )
    assert result.returncode == code
    assert result.stdout == b""
    assert f"\n{text}" in result.stderr.decode()


def test_no_arguments(program):
    result = serve(program)
    assert result.returncode == 2
    assert b"\nusage: serve " in result.stderr
