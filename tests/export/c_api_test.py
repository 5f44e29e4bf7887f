# SPDX-License-Identifier: Apache-2.0
"""Tests exported models in a C program, serve.c, without Python."""

import os
import pathlib
import shlex
import shutil
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import POOLING, make_rois, pooling_model, randomise, write
from operands import random
from tensorflow.core.protobuf import saved_model_pb2

from tf_deform import _build_info, _loader
from tf_deform.layers import DeformableConv2D

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
    return keras.Model(image, x), [random(3, 32, 32, 1, dtype="uint8")]


MODELS = {"one_layer": one_layer, "any_size": any_size, "segmenter": segmenter}


def export(name, folder):
    """Returns the arguments that describe a request, and its result."""
    if name in POOLING:
        model = pooling_model(name)
        arrays = [random(2, 15, 16, 18), make_rois(2, 5)]
    else:
        model, arrays = MODELS[name]()
        randomise(model)
    path = folder / name
    write("native", model, path, sample=arrays)
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((path / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    # The tensor's name in the signature.
    (output,) = (info.name for info in signature.outputs.values())
    arguments = [path, output]
    for tensor, array in zip(model.inputs, arrays, strict=True):
        file = folder / f"{name}_{tensor.name}.raw"
        array.tofile(file)
        shape = "x".join(map(str, array.shape))
        key = signature.inputs[tensor.name].name
        arguments.append(f"{key}={array.dtype}:{shape}:{file}")
    arrays = arrays if len(arrays) > 1 else arrays[0]
    return arguments, model(arrays).numpy()


@pytest.mark.parametrize("name", [*MODELS, *POOLING])
def test_results_are_the_same_as_in_python(name, program, tmp_path):
    arguments, expected = export(name, tmp_path)
    result = serve(program, _loader.LIBRARY, *arguments)
    assert result.returncode == 0, result.stderr.decode()
    assert np.any(tf.cast(expected, tf.float32))
    assert result.stdout == expected.tobytes()


@pytest.fixture(scope="module")
def request_of_a_layer(tmp_path_factory):
    return export("one_layer", tmp_path_factory.mktemp("model"))[0]


@pytest.mark.parametrize(
    ("library", "text"),
    [
        (
            "-",
            "TF_LoadSessionFromSavedModel: Op type not registered "
            "'TfDeform>ImportTfDeformOrLoadItsOpLibrary'",
        ),
        ("/nowhere/ops.so", "TF_LoadLibrary: /nowhere/ops.so: "),
    ],
    ids=["none", "another"],
)
def test_without_the_library(library, text, program, request_of_a_layer):
    """Tests the error. It names an op whose name tells what is missing."""
    result = serve(program, library, *request_of_a_layer)
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr.decode().splitlines()[-1].startswith(text)


def test_copies_of_the_library_and_the_core(
    program, request_of_a_layer, tmp_path
):
    """Tests that the op library looks for the core in its own folder alone."""
    copy = tmp_path / "ops.so"
    shutil.copy(_loader.LIBRARY, copy)
    result = serve(program, copy, *request_of_a_layer)
    assert result.returncode == 1
    text = f"TF_LoadLibrary: {_build_info.CORE}: cannot open"
    assert text in result.stderr.decode()
    package = pathlib.Path(_loader.LIBRARY).parent
    shutil.copy(package / _build_info.CORE, tmp_path)
    result = serve(program, copy, *request_of_a_layer)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout


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
        (2, None, "usage: serve "),
    ],
)
def test_bad_arguments(code, argument, text, program, request_of_a_layer):
    arguments = [_loader.LIBRARY, *request_of_a_layer[:2], argument]
    result = serve(program, *(arguments if argument else ()))
    assert result.returncode == code
    assert result.stdout == b""
    assert f"\n{text}" in result.stderr.decode()
