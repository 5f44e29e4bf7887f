# SPDX-License-Identifier: Apache-2.0
"""Tests the writing of exports: other processes, refusals, leftovers."""

import errno
import os
import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import (
    FORMATS,
    assert_close,
    call,
    check,
    pooling_model,
    small_model,
    write,
)
from operands import random

from tf_deform import _files, _loader, export
from tf_deform.export import _common
from tf_deform.layers import DeformableConv2D

IMAGE = {"image": random(3, 16, 20, 3)}

every_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def model():
    """Returns a model that no test changes."""
    return small_model((16, 20))


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    """Returns a folder that no test changes."""
    path = tmp_path_factory.mktemp("native") / "model"
    write("native", model, path)
    return path


# Arguments: a folder, the library. Runs the folder's files on an image.
BARE = """
import sys
sys.modules["tf_deform"] = None
import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

folder, library = sys.argv[1:]
image = np.load(folder + "/image.npy")
session = onnxruntime.InferenceSession(folder + "/onnx")
runner = Interpreter(folder + "/litert").get_signature_runner("serving_default")
outputs = {
    "onnx": session.run(None, {"image": image})[0],
    "litert": runner(image=image)["output_0"],
}
assert "tensorflow" not in sys.modules
import tensorflow as tf

def serve(kind):
    loaded = tf.saved_model.load(folder + "/" + kind)
    outputs[kind] = loaded.serve(tf.constant(image)).numpy()
    files = tf.stack([tf.io.encode_png(pixels) for pixels in image])
    assert np.array_equal(loaded.serve_image_bytes(files), outputs[kind])
    signature = loaded.signatures["serving_default"]
    received = signature(image=tf.constant(image))["output_0"]
    assert np.array_equal(received, outputs[kind])

serve("portable")
try:
    serve("native")
except Exception as error:
    print(error)
tf.load_op_library(library)
serve("native")
np.savez(folder + "/outputs.npz", **outputs)
"""


def test_in_a_process_without_the_package(run_python, tmp_path):
    """Tests all formats; native ops need a library, as the error says."""
    model = small_model((16, 20), dtype="uint8")
    sample = {"image": random(3, 16, 20, 3, dtype="uint8")}
    np.save(tmp_path / "image.npy", sample["image"])
    for kind in FORMATS:
        files = {"image_bytes": True} if kind == "portable" else {}
        write(kind, model, tmp_path / kind, **files)
    said = run_python(BARE, tmp_path, _loader.LIBRARY)
    assert "'TfDeform>ImportTfDeformOrLoadItsOpLibrary'" in said
    expected = call(model, sample)["output_0"]
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert {*outputs} == {*FORMATS}
        for kind, received in outputs.items():
            exact = {"tolerance": 0.0} if kind == "native" else {}
            assert_close(received, expected, name=kind, **exact)


def test_a_saved_model_as_a_layer(model, native):
    layer = keras.layers.TFSMLayer(native, call_endpoint="serve")
    expected = call(model, IMAGE)["output_0"]
    assert np.array_equal(layer(IMAGE["image"]), expected)


def test_native_models_need_native_ops(run_python, tmp_path):
    """Tests that formats with native ops say so, and that the others work."""
    said = run_python(
        """
import keras, sys, tf_deform
image = keras.Input((8, 9, 2))
model = keras.Model(image, tf_deform.layers.DeformableConv2D(3, 3)(image))
path = sys.argv[1]
tf_deform.export.litert(model, path + "/litert", verbose=False)
tf_deform.export.saved_model(model, path + "/model", "portable", verbose=False)
for write in (tf_deform.export.onnx, tf_deform.export.saved_model):
    try:
        write(model, path + "/other", verbose=False)
    except RuntimeError as error:
        print(error)
""",
        tmp_path,
        TF_DEFORM_IMPLEMENTATION="portable",
    )
    assert len(said.splitlines()) == 2
    assert said.count("Expected native ops") == 2
    assert sorted(os.listdir(tmp_path)) == ["litert", "model"]


# Exports that fail, and leave no file behind.


class Unexportable(keras.layers.Layer):
    """Adds 1 in Python, which no other runtime can run."""

    def call(self, inputs):
        outputs = tf.numpy_function(lambda x: x + 1, [inputs], inputs.dtype)
        return tf.ensure_shape(outputs, inputs.shape)


def around(layer):
    image = keras.Input((8, 9, 2), name="image")
    x = DeformableConv2D(3, 3)(image)
    return keras.Model(image, layer(x))


@pytest.mark.parametrize("kind", ["onnx", "litert"])
def test_a_layer_that_cannot_be_exported(kind, tmp_path):
    model = around(Unexportable(name="adds_in_python"))
    with pytest.raises(ValueError, match="Expected a model .*PyFunc"):
        write(kind, model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@every_format
def test_results_that_differ(kind, tmp_path):
    class Random(keras.layers.Layer):
        def call(self, inputs):
            return inputs + tf.random.uniform(tf.shape(inputs))

    model = around(Random())
    with pytest.raises(RuntimeError, match="Expected .*to give what the model"):
        write(kind, model, tmp_path / "model")
    assert os.listdir(tmp_path) == []
    report = write(kind, model, tmp_path / "model", tolerance=np.inf)
    assert report.differences["output_0"] > 1e-3


def interrupt(*_, **__):
    raise KeyboardInterrupt


@every_format
def test_what_was_there_stays_until_the_end(kind, model, tmp_path, monkeypatch):
    path = file = tmp_path / "model"
    if kind in ("native", "portable"):
        path.mkdir()
        file = path / "saved_model.pb"
    file.write_bytes(b"what was there")
    with monkeypatch.context() as patch:
        patch.setattr(_common, "compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(kind, model, path)
    assert [x for x in tmp_path.rglob("*") if x.is_file()] == [file]
    assert file.read_bytes() == b"what was there"
    check(kind, model, path, IMAGE)
    assert os.listdir(tmp_path) == ["model"]


@every_format
def test_paths_that_cannot_be_written(kind, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    cases = [
        (os.fsencode(tmp_path / "model"), TypeError, "to be a str or an os.Pa"),
        (tmp_path / "missing" / "model", FileNotFoundError, "to be in"),
        (tmp_path / "file" / "model", NotADirectoryError, "to be in"),
        (tmp_path / "folder", FileExistsError, "a folder with other things"),
    ]
    if kind in ("native", "portable"):
        cases.append((tmp_path / "file", FileExistsError, "which is a file"))
    for path, error, text in cases:
        with pytest.raises(error, match=f"Expected `path` .*{text}"):
            write(kind, model, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        tf.errors.ResourceExhaustedError(
            None, None, "staging/variables; No space left on device"
        ),
        tf.errors.ResourceExhaustedError(None, None, "memory"),
    ],
    ids=["of Python", "of TensorFlow", "another"],
)
def test_a_full_disk(error, model, tmp_path, monkeypatch):
    """Tests that every error is reported in one way, with the given path."""

    def save(_, folder, *__):
        os.makedirs(folder)
        raise error

    monkeypatch.setattr(tf.saved_model, "save", save)
    kind, text = type(error), "memory"
    if "memory" not in str(error):
        kind = OSError
        text = "`path` to have space .* Received: No space left .*: '.*mod"
    with pytest.raises(kind, match=text) as caught:
        write("native", model, tmp_path / "model")
    if kind is OSError:
        assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("opset", [18, 23, "19", 19.0, True])
def test_another_opset(opset, model, tmp_path):
    with pytest.raises(ValueError, match="Expected `opset` to be from 19"):
        write("onnx", model, tmp_path / "model", opset=opset)


@pytest.mark.parametrize(
    "kind,module,extra",
    [
        ("onnx", "onnx", "onnx"),
        ("onnx", "tf2onnx", "onnx"),
        ("onnx", "onnxruntime", "onnx"),
        ("litert", "ai_edge_litert.interpreter", "litert"),
    ],
)
def test_a_missing_package(kind, module, extra, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    install = rf"pip install 'tf-deform\[{extra}\]'"
    with pytest.raises(ImportError, match=install):
        write(kind, model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_bad_arguments(model, tmp_path):
    pixels = small_model((16, 20), dtype="uint8")
    narrow = tf.function(
        lambda x: model(tf.pad(x, ((0, 0), (0, 0), (0, 4), (0, 0)))),
        [tf.TensorSpec((None, None, 16, 3))],
    )
    text = tf.function(tf.strings.length, [tf.TensorSpec((None,), "string")])
    cases = [
        (lambda x: x, {}, TypeError, "keras.Model or a tf.function"),
        (tf.function(lambda x: x), {}, ValueError, "or a tf.function with one"),
        # Random numbers are no regions.
        (pooling_model("align"), {}, ValueError, "Expected `sample`.*made up"),
        (text, {}, ValueError, "of strings"),
        (
            narrow,
            {"sample": random(1, 15, 16, 3)},
            ValueError,
            "inputs that the model takes.*given",
        ),
    ]
    cases += [
        (model, {name: value}, error, message)
        for name, value, error, message in (
            ("input_signature", [{"image": 3}], TypeError, "a flat list of tf"),
            ("input_signature", [], TypeError, "a list of tf.TensorSpec"),
            ("sample", [1, 2], ValueError, "to hold 1 arrays"),
            ("sample", {"images": 1}, ValueError, "to have the keys"),
            ("tolerance", "1", TypeError, "`tolerance` to be a number"),
        )
    ]
    for sample in (
        random(1, 15, 20, 3),
        random(16, 20, 3),
        np.full((1, 16, 20, 3), "1"),
        np.zeros((1, 16, 20, 3), "complex64"),
    ):
        message = "an array of shape.*float32"
        cases.append((model, {"sample": sample}, ValueError, message))
    for value in (0.5, -1, 256):
        sample = {"sample": np.full((1, 16, 20, 3), value)}
        cases.append((pixels, sample, ValueError, "values of the type uint8"))
    path = tmp_path / "model"
    for source, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            write("onnx", source, path, **arguments)
    with pytest.raises(ValueError, match='"native" or "portable"'):
        export.saved_model(model, path, "onnx")
    with pytest.raises(TypeError, match="`image_bytes` to be a function"):
        write("native", model, path, image_bytes="yes")
    assert os.listdir(tmp_path) == []
    write("onnx", pixels, path, sample=np.full((1, 16, 20, 3), 255.0))


def test_tables(tmp_path):
    text = keras.Input((1,), dtype="string", name="text")
    model = keras.Model(text, keras.layers.StringLookup(vocabulary=["a"])(text))
    sample = np.array([["a"], ["b"]])
    with pytest.raises(ValueError, match="all resources are variables"):
        write("native", model, tmp_path / "model", sample=sample)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_swap_that_fails_leaves_what_was_there(
    when, model, native, tmp_path, monkeypatch
):
    path, put = tmp_path / "model", _files._put
    shutil.copytree(native, path)

    def stop(staging, target):
        if when == "after":
            put(staging, target)
        interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_put", stop)
        with pytest.raises(KeyboardInterrupt):
            write("native", model, path)
    assert os.listdir(tmp_path) == ["model"]
    loaded = tf.saved_model.load(path)
    expected = call(model, IMAGE)["output_0"]
    assert_close(loaded.serve(IMAGE["image"]), expected)


def test_links_and_the_folder_itself(model, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "target.onnx")
    report = write("onnx", model, tmp_path / "link")
    assert report.path == tmp_path / "target.onnx"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write("native", model, ".")
    assert (tmp_path / "empty" / "saved_model.pb").exists()


def test_what_is_said(model, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    report = export.onnx(model, path)
    said = capsys.readouterr().out.splitlines()
    for line, begin in zip(
        said,
        ("Running the model", "Tracing", "Converting", "Running model.onnx"),
        strict=False,
    ):
        assert line.startswith(begin)
        assert line.endswith(" s")
    assert said[4] == str(report)
    assert str(path) in said[4]
    assert report.size == path.stat().st_size
    with pytest.raises(ValueError, match="PyFunc"):
        export.onnx(around(Unexportable()), path)
    assert "Converting to ONNX ... failed" in capsys.readouterr().out
