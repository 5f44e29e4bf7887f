# SPDX-License-Identifier: Apache-2.0
"""Tests the writing of exports: other processes, refusals, leftovers."""

import errno
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import (
    CLOSE,
    FORMATS,
    assert_close,
    make_rois,
    pooling_model,
    run,
    small_model,
    write,
)
from operands import random

from tf_deform import _files, export
from tf_deform.export import _common
from tf_deform.layers import DeformableConv2D

# A process has only these files where the package is not installed.
WITHOUT_PACKAGE = """
import sys
sys.modules["tf_deform"] = None
"""


# The processes know neither the model nor this package.


def test_onnx_and_litert_in_bare_processes(run_python, tmp_path):
    model = small_model((16, 20))
    image = random(3, 16, 20, 3)
    np.save(tmp_path / "image.npy", image)
    scripts = {
        "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
outputs, = session.run(None, {"image": image})
""",
        "litert": """
from ai_edge_litert.interpreter import Interpreter
runner = Interpreter(sys.argv[1]).get_signature_runner("serving_default")
outputs = runner(image=image)["output_0"]
""",
    }
    for kind, script in scripts.items():
        write(kind, model, tmp_path / kind)
        run_python(
            WITHOUT_PACKAGE
            + "import numpy as np\nimage = np.load(sys.argv[2])\n"
            + script
            + "assert 'tensorflow' not in sys.modules\n"
            + "np.save(sys.argv[3], outputs)",
            tmp_path / kind,
            tmp_path / "image.npy",
            tmp_path / "outputs.npy",
        )
        received = np.load(tmp_path / "outputs.npy")
        assert_close(received, model(image, training=False))


def encode(images, kind="png"):
    encoder = {"png": tf.io.encode_png, "jpeg": tf.io.encode_jpeg}[kind]
    return tf.stack([encoder(image) for image in images])


@pytest.mark.parametrize(
    "kind,prepare",
    [
        ("native", "import sys, tf_deform"),
        ("native", WITHOUT_PACKAGE + "import tensorflow as tf\n{load}"),
        ("portable", WITHOUT_PACKAGE),
    ],
    ids=["import", "load_op_library", "nothing"],
)
def test_saved_models_in_a_process_of_their_own(
    kind, prepare, run_python, tmp_path
):
    model = small_model((16, 20), dtype="uint8")
    report = write(kind, model, tmp_path / "model")
    image = random(3, 16, 20, 3, dtype="uint8")
    np.save(tmp_path / "image.npy", image)
    command = [sys.executable, "-m", "tf_deform", "library"]
    library = subprocess.run(command, capture_output=True, text=True).stdout
    load = f"tf.load_op_library({library.strip()!r})"
    run_python(
        prepare.format(load=load)
        + """
import numpy as np
import tensorflow as tf

image = np.load(sys.argv[2])
loaded = tf.saved_model.load(sys.argv[1])
outputs = loaded.serve(tf.constant(image)).numpy()
files = tf.stack([tf.io.encode_png(pixels) for pixels in image])
assert np.array_equal(loaded.serve_image_bytes(files), outputs)
layer_outputs = loaded.signatures["serving_default"](image=tf.constant(image))
assert np.array_equal(layer_outputs["output_0"], outputs)
np.save(sys.argv[3], outputs)
""",
        report.path,
        tmp_path / "image.npy",
        tmp_path / "outputs.npy",
    )
    received = np.load(tmp_path / "outputs.npy")
    exact = 0.0 if kind == "native" else CLOSE
    assert_close(received, model(image, training=False), exact)


def test_without_the_ops_the_error_says_what_to_do(run_python, tmp_path):
    write("native", small_model((16, 20)), tmp_path / "model")
    said = run_python(
        WITHOUT_PACKAGE
        + """
import tensorflow as tf

try:
    tf.saved_model.load(sys.argv[1])
except Exception as error:
    print(error)
""",
        tmp_path / "model",
    )
    assert "'TfDeform>ImportTfDeformOrLoadItsOpLibrary'" in said


def test_image_bytes(tmp_path):
    fixed = small_model((16, 20), channels=1)
    write("native", fixed, tmp_path / "fixed")
    loaded = tf.saved_model.load(tmp_path / "fixed")
    # Images of any size, and of any kind.
    large = random(33, 47, 1, dtype="uint8")
    colour = random(16, 20, 3, dtype="uint8")
    files = tf.stack([*encode([large], "jpeg"), *encode([colour])])
    resized = [
        tf.image.resize(pixels, (16, 20), antialias=True)
        for pixels in (
            tf.io.decode_image(file, channels=1, expand_animations=False)
            for file in files
        )
    ]
    expected = fixed(tf.round(tf.stack(resized)), training=False)
    assert_close(np.asarray(loaded.serve_image_bytes(files)), expected)
    nothing = loaded.serve_image_bytes(tf.constant([], tf.string))
    assert nothing.shape[0] == 0

    dynamic = small_model(dtype="uint8")
    write("native", dynamic, tmp_path / "dynamic")
    loaded = tf.saved_model.load(tmp_path / "dynamic")
    images = random(2, 18, 31, 3, dtype="uint8")
    received = np.asarray(loaded.serve_image_bytes(encode(images)))
    assert np.array_equal(received, dynamic(images, training=False))


def test_image_bytes_made_by_the_user(tmp_path):
    model = small_model((16, 20))

    def fit(pixels):
        pixels = tf.image.resize_with_crop_or_pad(pixels, 16, 20)
        return tf.cast(pixels, "float32") / 255

    write("native", model, tmp_path / "model", image_bytes=fit)
    loaded = tf.saved_model.load(tmp_path / "model")
    image = random(9, 24, 3, dtype="uint8")
    received = np.asarray(loaded.serve_image_bytes(encode([image])))
    assert_close(received, model(fit(image)[None], training=False))

    write("native", model, tmp_path / "model", image_bytes=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert not hasattr(loaded, "serve_image_bytes")

    pooling = pooling_model("align")
    sample = [random(2, 20, 24, 18), make_rois(2, 4)]
    with pytest.raises(ValueError, match="a model of one image"):
        write(
            "native",
            pooling,
            tmp_path / "model",
            sample=sample,
            image_bytes=True,
        )


def test_a_saved_model_as_a_layer(tmp_path):
    model = small_model((16, 20))
    write("native", model, tmp_path / "model")
    layer = keras.layers.TFSMLayer(tmp_path / "model", call_endpoint="serve")
    image = random(2, 16, 20, 3)
    assert np.array_equal(layer(image), model(image, training=False))


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


@pytest.mark.parametrize("kind", FORMATS)
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


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_there_stays_until_the_end(kind, tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(kind, small_model((16, 20)), path)
    sizes = {
        str(file.relative_to(tmp_path)): file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file()
    }

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_common, "compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(kind, small_model((24, 20)), path)
    assert sizes == {
        str(file.relative_to(tmp_path)): file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    other = small_model((24, 20))
    write(kind, other, path)
    assert os.listdir(tmp_path) == ["model"]
    image = random(1, 24, 20, 3)
    received = run(kind, path, {"image": image})
    assert_close(received["output_0"], other(image, training=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_paths_that_cannot_be_written(kind, tmp_path):
    model = small_model((16, 20))
    with pytest.raises(TypeError, match="`path` to be a str or an os.PathLi"):
        write(kind, model, os.fsencode(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="Expected `path` to be in"):
        write(kind, model, tmp_path / "missing" / "model")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="Expected `path` to be in"):
        write(kind, model, tmp_path / "file" / "model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="a folder with other things"):
        write(kind, model, tmp_path / "folder")
    if kind in ("native", "portable"):
        with pytest.raises(FileExistsError, match="which is a file"):
            write(kind, model, tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        tf.errors.ResourceExhaustedError(
            None, None, "staging/variables; No space left on device"
        ),
    ],
)
def test_a_full_disk(error, tmp_path, monkeypatch):
    """Tests that every error is reported in one way, with the given path."""

    def save(_, folder, *__):
        os.makedirs(folder)
        raise error

    monkeypatch.setattr(tf.saved_model, "save", save)
    text = "`path` to have space .* Received: No space left on device: '.*mod"
    with pytest.raises(OSError, match=text) as caught:
        write("native", small_model((16, 20)), tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    error = tf.errors.ResourceExhaustedError(None, None, "memory")
    with pytest.raises(tf.errors.ResourceExhaustedError, match="memory"):
        write("native", small_model((16, 20)), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("opset", [18, 23, "19", 19.0, True])
def test_another_opset(opset, tmp_path):
    with pytest.raises(ValueError, match="Expected `opset` to be from 19"):
        write("onnx", small_model((16, 20)), tmp_path / "model", opset=opset)


@pytest.mark.parametrize(
    "kind,module,extra",
    [
        ("onnx", "onnx", "onnx"),
        ("onnx", "tf2onnx", "onnx"),
        ("onnx", "onnxruntime", "onnx"),
        ("litert", "ai_edge_litert.interpreter", "litert"),
    ],
)
def test_a_missing_package(kind, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    install = rf"pip install 'tf-deform\[{extra}\]'"
    with pytest.raises(ImportError, match=install):
        write(kind, small_model((16, 20)), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path):
    path = tmp_path / "model"
    model = small_model((16, 20))
    with pytest.raises(TypeError, match="keras.Model or a tf.function"):
        write("onnx", lambda x: x, path)
    with pytest.raises(ValueError, match="or a tf.function with one"):
        write("onnx", tf.function(lambda x: x), path)
    with pytest.raises(TypeError, match="a flat list of tf.TensorSpec"):
        write("onnx", model, path, input_signature=[{"image": 3}])
    with pytest.raises(ValueError, match='"native" or "portable"'):
        export.saved_model(model, path, "onnx")
    with pytest.raises(ValueError, match="to hold 1 arrays"):
        write("onnx", model, path, sample=[1, 2])
    with pytest.raises(ValueError, match="to have the keys"):
        write("onnx", model, path, sample={"images": 1})
    for sample in (
        random(1, 15, 20, 3),
        random(16, 20, 3),
        np.full((1, 16, 20, 3), "1"),
        np.zeros((1, 16, 20, 3), "complex64"),
    ):
        with pytest.raises(ValueError, match="an array of shape.*float32"):
            write("onnx", model, path, sample=sample)
    pixels = small_model((16, 20), dtype="uint8")
    for value in (0.5, -1, 256):
        with pytest.raises(ValueError, match="values of the type uint8"):
            write("onnx", pixels, path, sample=np.full((1, 16, 20, 3), value))
    write("onnx", pixels, path, sample=np.full((1, 16, 20, 3), 255.0))
    path.unlink()
    narrow = tf.function(
        lambda x: model(tf.pad(x, ((0, 0), (0, 0), (0, 4), (0, 0)))),
        [tf.TensorSpec((None, None, 16, 3))],
    )
    with pytest.raises(ValueError, match="inputs that the model takes.*given"):
        write("onnx", narrow, path, sample=random(1, 15, 16, 3))
    with pytest.raises(TypeError, match="a list of tf.TensorSpec"):
        write("onnx", model, path, input_signature=[])
    with pytest.raises(TypeError, match="`tolerance` to be a number"):
        write("litert", model, path, tolerance="1")
    with pytest.raises(TypeError, match="`image_bytes` to be a function"):
        write("native", model, path, image_bytes="yes")
    # Random numbers are no regions.
    with pytest.raises(ValueError, match=r"Expected `sample`.*made up"):
        write("onnx", pooling_model("align"), path)
    text = tf.function(tf.strings.length, [tf.TensorSpec((None,), "string")])
    with pytest.raises(ValueError, match="of strings"):
        write("native", text, path)
    assert os.listdir(tmp_path) == []


def test_tables(tmp_path):
    text = keras.Input((1,), dtype="string", name="text")
    model = keras.Model(text, keras.layers.StringLookup(vocabulary=["a"])(text))
    sample = np.array([["a"], ["b"]])
    with pytest.raises(ValueError, match="all resources are variables"):
        write("native", model, tmp_path / "model", sample=sample)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_swap_that_fails_leaves_what_was_there(when, tmp_path, monkeypatch):
    model = small_model((16, 20))
    write("native", model, tmp_path / "model")
    put = _files._put

    def interrupt(staging, target):
        if when == "after":
            put(staging, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write("native", model, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    image = random(1, 16, 20, 3)
    received = run("native", tmp_path / "model", {"image": image})
    assert_close(received["output_0"], model(image, training=False))


def test_links_and_the_folder_itself(tmp_path, monkeypatch):
    model = small_model((16, 20))
    (tmp_path / "link").symlink_to(tmp_path / "target.onnx")
    report = write("onnx", model, tmp_path / "link")
    assert report.path == tmp_path / "target.onnx"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write("native", model, ".")
    assert (tmp_path / "empty" / "saved_model.pb").exists()


def test_what_is_said(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    report = export.onnx(small_model((16, 20)), path)
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
    model = around(Unexportable())
    with pytest.raises(ValueError, match="PyFunc"):
        export.onnx(model, path)
    assert "Converting to ONNX ... failed" in capsys.readouterr().out


def test_differences():
    """Tests the number that is reported, also for NaN and infinities."""
    compare = _common.measure_difference
    values = np.array([1.0, -4.0, np.nan, np.inf])
    assert compare(values, values) == 0
    assert compare(values, values + [0, 1, 0, 0]) == 0.25
    assert compare(values, [1, -4, 0, np.inf]) == np.inf
    assert compare(values, [1, -4, np.nan, -np.inf]) == np.inf
    assert compare(values, values[:3]) == np.inf
    assert compare(np.zeros(2), np.ones(2)) == np.inf
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert compare(np.array([b"a", b"b"]), np.array(["a", "c"])) == 0.5
    assert compare(np.array([1, 2, 300, 4]), np.array([1, 2, 3, 4])) == 0.25
    assert compare(np.array([True, False]), np.array([True, True])) == 0.5
