# SPDX-License-Identifier: Apache-2.0
"""Models written for other programs give there what they give here.

Every file runs in its own runtime, called by the tests themselves, on other
inputs, batches and sizes than those that the export tried. Both compute in
float32 but sum in another order: results are compared to 1e-5 of the largest
number.
"""

import errno
import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import tensorflow as tf
from exported import CLOSE, FORMATS, assert_close, random, run, write

from tf_deform import _files, export
from tf_deform.export import _common
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

# As much as a process has where the package is not installed.
WITHOUT_PACKAGE = """
import sys
sys.modules["tf_deform"] = None
"""


def randomise(model, scale=0.3):
    """Weights that leave nothing at zero: branches start there."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        values = rng.normal(size=weight.shape) * scale
        if "variance" in weight.path:
            values = 1 + np.abs(values)
        weight.assign(values)
    return model


def small_model(size=(None, None), channels=3, dtype="float32", **arguments):
    """Two convolutions, the second deformable, and a score."""
    image = keras.Input((*size, channels), dtype=dtype, name="image")
    x = image
    if dtype == "uint8":
        x = keras.layers.Rescaling(1 / 127, offset=-1)(image)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same")(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    arguments = {
        "kernel_size": 3,
        "padding": "same",
        "modulation": "2sigmoid",
        **arguments,
    }
    x = DeformableConv2D(6, name="deformable", **arguments)(x)
    x = keras.layers.Conv2D(5, 1, activation="softmax")(x)
    return randomise(keras.Model(image, x))


CONVOLUTIONS = [
    {},
    {"modulation": None, "use_bias": False},
    {"modulation": "sigmoid", "offset_groups": 2, "groups": 2},
    {"strides": 2, "activation": "relu"},
    {"strides": (3, 2), "kernel_size": (2, 5), "dilation_rate": (3, 1)},
    {"padding": ((2, 0), (1, 3)), "dilation_rate": 2, "strides": (1, 2)},
    {"padding": "valid", "kernel_size": (4, 1), "offset_groups": 8},
    {"boundary": "clamp", "offset_groups": 4},
    {"boundary": "clamp", "strides": 2, "modulation": None},
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("arguments", CONVOLUTIONS)
def test_convolutions(kind, arguments, tmp_path):
    model = small_model(**arguments)
    report = write(kind, model, tmp_path / "model")
    assert report.differences["output_0"] < CLOSE
    assert report.shapes == [
        {"image": (2, 64, 96, 3)},
        {"image": (3, 96, 64, 3)},
    ]
    for shape in ((1, 20, 17, 3), (4, 23, 32, 3)):
        image = random(*shape, seed=shape[1])
        received = run(kind, report.path, {"image": image})
        assert_close(received["output_0"], model(image, training=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_static_sizes_and_pixels(kind, tmp_path):
    model = small_model((21, 18), channels=1, dtype="uint8", strides=2)
    report = write(kind, model, tmp_path / "model")
    image = random(5, 21, 18, 1, dtype="uint8")
    received = run(kind, report.path, {"image": image})
    assert_close(received["output_0"], model(image, training=False))


@pytest.mark.parametrize("kind", FORMATS)
def test_uint8_for_a_model_of_floats(kind, tmp_path):
    model = small_model()
    signature = [tf.TensorSpec((None, 32, None, 3), "uint8", "pixels")]
    write(kind, model, tmp_path / "model", input_signature=signature)
    pixels = random(2, 32, 40, 3, dtype="uint8")
    received = run(kind, tmp_path / "model", {"pixels": pixels})
    assert_close(received["output_0"], model(pixels, training=False))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_given_offsets(kind, boundary, tmp_path):
    inputs = keras.Input((None, None, 4), name="inputs")
    offset = keras.Input((None, None, 18), name="offset")
    modulator = keras.Input((None, None, 9), name="modulator")
    layer = DeformableConv2D(3, 3, padding="same", boundary=boundary)
    model = keras.Model(
        [inputs, offset, modulator], layer(inputs, offset, modulator)
    )

    def values(batch, height, width):
        return {
            "inputs": random(batch, height, width, 4),
            "offset": random(batch, height, width, 18, seed=1),
            "modulator": random(batch, height, width, 9, seed=2),
        }

    write(kind, model, tmp_path / "model", sample=values(2, 7, 8))
    given = values(3, 9, 6)
    # Outside of the image, whatever is made of it.
    given["offset"][0, 2, 3, :4] = np.nan, np.inf, -np.inf, 1e30
    received = run(kind, tmp_path / "model", given)
    assert np.isfinite(received["output_0"]).all()
    assert_close(received["output_0"], model(list(given.values())))


def make_rois(batch, count, seed=0):
    """Regions inside and across the edges of maps of scale 1/4; padding."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 60, (count, 2))
    rois = np.concatenate(
        [
            np.arange(count)[:, None] % (batch + 1) - 1,
            corner,
            corner + rng.uniform(1, 70, (count, 2)),
        ],
        axis=1,
    )
    return rois.astype("float32")


def pooling_model(kind, own_branch=True):
    features = keras.Input((None, None, 18), name="features")
    rois = keras.Input((5,), name="rois")
    if kind == "psroi":
        layer = DeformablePSROIPooling(2, 3, 0.25, trans_std=0.3)
        branch = {"trans_inputs": features} if own_branch else {}
        outputs = layer(features, rois, **branch)
    else:
        layer = {
            "roi": DeformableROIPooling(3, 0.25, trans_std=0.3, units=(7,)),
            "align": DeformableROIAlign((3, 2), 0.25, gamma=0.3, units=(7,)),
            "align-samples": DeformableROIAlign(2, 0.25, sampling_ratio=3),
        }[kind]
        outputs = layer(features, rois)
    return randomise(keras.Model([features, rois], outputs))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layer", ["psroi", "roi", "align", "align-samples"])
def test_pooling(kind, layer, tmp_path):
    model = pooling_model(layer)
    sample = {"features": random(2, 20, 24, 18), "rois": make_rois(2, 9)}
    write(kind, model, tmp_path / "model", sample=sample)
    given = {
        "features": random(3, 17, 21, 18, seed=1),
        "rois": make_rois(3, 13, seed=1),
    }
    # No regions, each in its way.
    given["rois"][[1, 2, 3, 5], [1, 2, 3, 4]] = np.nan, np.inf, -np.inf, 1e30
    received = run(kind, tmp_path / "model", given)["output_0"]
    assert_close(received, model(list(given.values())))
    assert not received[given["rois"][:, 0] < 0].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_names_and_nested_outputs(kind, tmp_path):
    a, b = (keras.Input((8, 9, 2), name=name) for name in ("a", "b"))
    y = DeformableConv2D(3, 3)(a)
    z = (y + 1.0, keras.layers.Flatten()(b))
    model = randomise(keras.Model({"a": a, "b": b}, {"y": y, "z": z}))
    report = write(kind, model, tmp_path / "model")
    assert list(report.differences) == ["y", "z_0", "z_1"]
    given = {"b": random(2, 8, 9, 2), "a": random(2, 8, 9, 2, seed=1)}
    received = run(kind, report.path, given)
    expected = model(given)
    assert_close(received["y"], expected["y"])
    assert_close(received["z_0"], expected["z"][0])
    assert_close(received["z_1"], expected["z"][1])


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_and_subclassed_models(kind, tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = DeformableConv2D(3, 3, padding=1)

        def call(self, inputs):
            return self.layer(inputs)

    model = Model()
    x = random(2, 8, 9, 2)
    model(x)
    spec = tf.TensorSpec((None, None, None, 2), "float32", "x")

    @tf.function(input_signature=[spec, tf.TensorSpec((), "float32")])
    def function(x, factor):
        y = model(x)
        if factor > 2:  # Autograph's
            y *= factor
        return {"y": y, "rows": tf.shape(y)[1]}

    expected = function(x, 3.0)
    write(kind, function, tmp_path / "function")
    given = {"x": x, "factor": np.array(3, "float32")}
    received = run(kind, tmp_path / "function", given)
    assert_close(received["y"], expected["y"])
    assert received["rows"] == 8

    with pytest.raises(ValueError, match="Expected `input_signature`"):
        write(kind, model, tmp_path / "model")
    write(kind, model, tmp_path / "model", input_signature=[spec])
    received = run(kind, tmp_path / "model", {"x": x})
    assert_close(received["output_0"], model(x))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_mixed_precision(kind, policy, tmp_path):
    """To the type's rounding, in a graph; other runtimes: in float32."""
    keras.config.set_dtype_policy(policy)
    model = small_model((16, 20), dtype="uint8")
    weights = model.get_weights()
    write(kind, model, tmp_path / "model")
    assert model.get_layer("deformable").compute_dtype == policy[6:]
    image = random(2, 16, 20, 3, dtype="uint8")
    received = run(kind, tmp_path / "model", {"image": image})["output_0"]
    if kind in ("onnx", "litert"):
        keras.config.set_dtype_policy("float32")
        model = small_model((16, 20), dtype="uint8")
        model.set_weights(weights)
        assert_close(received, model(image, training=False))
    else:
        rounding = 2.0**-10 if policy == "mixed_float16" else 2.0**-7
        expected = model(image, training=False)
        # TensorFlow's graphs round less often than its eager mode.
        assert_close(received, expected, 4 * rounding)


# ONNX and what reads it.


def count_nodes(path, kind):
    nodes = onnx.load(path).graph.node
    return sum(node.op_type == kind for node in nodes)


@pytest.mark.parametrize("opset", [19, 20, 21, 22])
def test_onnx_has_the_standards_operator(opset, tmp_path):
    model = small_model(offset_groups=4, groups=2, strides=(1, 2))
    write("onnx", model, tmp_path / "model.onnx", opset=opset)
    proto = onnx.load(tmp_path / "model.onnx")
    versions = {item.domain: item.version for item in proto.opset_import}
    assert versions[""] == opset
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    (node,) = (n for n in proto.graph.node if n.op_type == "DeformConv")
    attributes = {
        attribute.name: onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
    }
    assert attributes["offset_group"] == 4
    assert attributes["group"] == 2
    assert attributes["strides"] == [1, 2]
    assert attributes["kernel_shape"] == [3, 3]
    # One path through the graph, whatever the sizes are.
    assert not {"If", "Loop"} & {node.op_type for node in proto.graph.node}
    assert count_nodes(tmp_path / "model.onnx", "GatherND") == 0
    write("onnx", small_model(boundary="clamp"), tmp_path / "clamp.onnx")
    assert count_nodes(tmp_path / "clamp.onnx", "DeformConv") == 0


def load_openvino_extension():
    examples = pathlib.Path(__file__).parents[2] / "examples"
    spec = importlib.util.spec_from_file_location(
        "openvino_extension", examples / "openvino_extension.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.deform_conv()


def run_openvino(path, *inputs):
    core = openvino.Core()
    core.add_extension(load_openvino_extension())
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(path, "CPU", exact)
    return compiled(list(inputs))[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"modulation": None},
        {"strides": 2, "offset_groups": 2},
        {"groups": 2, "dilation_rate": 2},
        {"boundary": "clamp"},
    ],
)
def test_openvino_reads_onnx(arguments, tmp_path):
    model = small_model(**arguments)
    write("onnx", model, tmp_path / "model.onnx")
    image = random(2, 20, 17, 3)
    received = run_openvino(tmp_path / "model.onnx", image)
    assert_close(received, model(image, training=False))


def test_openvino_reads_onnx_of_others(tmp_path):
    """With a bias, and attributes left out."""
    x, w, b = random(1, 4, 6, 7), random(5, 4, 3, 3, seed=1), random(5, seed=2)
    offset = random(1, 18, 4, 5, seed=3)
    float_ = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DeformConv", ["x", "w", "o", "b"], ["y"])],
        "graph",
        [
            onnx.helper.make_tensor_value_info("x", float_, x.shape),
            onnx.helper.make_tensor_value_info("o", float_, offset.shape),
        ],
        [onnx.helper.make_tensor_value_info("y", float_, (1, 5, 4, 5))],
        [onnx.numpy_helper.from_array(w, "w")]
        + [onnx.numpy_helper.from_array(b, "b")],
    )
    opsets = [onnx.helper.make_opsetid("", 19)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(proto, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (expected,) = session.run(None, {"x": x, "o": offset})
    received = run_openvino(tmp_path / "model.onnx", x, offset)
    assert_close(received, expected)


# Processes that know nothing of the model, and not of this package.


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
    # Of any size, and of any kind.
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


# What cannot be exported, and what is left behind: nothing.


class Unexportable(keras.layers.Layer):
    """Adds 1 in Python, where no other runtime can follow."""

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
    """Says so in one way, for the path that was asked for."""

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
    # Made-up numbers are no regions.
    with pytest.raises(ValueError, match=r"Expected `sample`.*made up"):
        write("onnx", pooling_model("align"), path)
    text = tf.function(tf.strings.length, [tf.TensorSpec((None,), "string")])
    with pytest.raises(ValueError, match="of strings"):
        write("native", text, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_were_traced_before(kind, tmp_path):
    """They hold native ops, and are traced anew."""
    layer = DeformableConv2D(3, 3, boundary="clamp")
    spec = tf.TensorSpec((None, 8, 9, 2), "float32", "x")
    inner = tf.function(layer, [spec], autograph=False)
    x = random(2, 8, 9, 2)
    expected = inner(x)
    outer = tf.function(lambda x: inner(x), [spec])
    write(kind, outer, tmp_path / "model")
    received = run(kind, tmp_path / "model", {"x": x})
    assert_close(received["output_0"], expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_cannot_be_traced_anew(kind, tmp_path):
    """An export must not hide that native ops are left."""

    class Conditional(keras.layers.Layer):
        """Has a function that Autograph must read, which Keras' are not."""

        def __init__(self, boundary):
            super().__init__()
            self.convolution = DeformableConv2D(2, 3, boundary=boundary)
            self.function = tf.function(self.double_if_large)

        def double_if_large(self, x):
            y = self.convolution(x)
            if tf.reduce_max(y) > 1:
                y *= 2.0
            return y

        def call(self, inputs):
            return self.function(inputs)

    image = keras.Input((8, 9, 2), name="image")
    model = keras.Model(image, Conditional("clamp")(image))
    x = random(2, 8, 9, 2)
    expected = model(x)
    if kind == "native":
        write(kind, model, tmp_path / "model")
        received = run(kind, tmp_path / "model", {"image": x})
        assert np.array_equal(received["output_0"], expected)
        return
    with pytest.raises(ValueError, match="TfDeform>.*traced before"):
        write(kind, model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_that_autograph_must_read(kind, tmp_path):
    """They stay functions, where others become part of what is exported."""

    class Conditional(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.function = tf.function(self.double_if_large)

        def double_if_large(self, x):
            if tf.reduce_max(x) > 1:
                x *= 2.0
            return x

        def call(self, inputs):
            return self.function(inputs)

    image = keras.Input((8, 9, 2), name="image")
    x = DeformableConv2D(3, 3)(image)
    model = randomise(keras.Model(image, Conditional()(x)))
    write(kind, model, tmp_path / "model")
    assert not tf.config.functions_run_eagerly()
    for scale in (0.01, 9):  # Below and above.
        given = scale * random(2, 8, 9, 2)
        received = run(kind, tmp_path / "model", {"image": given})
        assert_close(received["output_0"], model(given))


# What models are made of besides.


def assert_exports(kind, model, path, *inputs, names=None):
    report = write(kind, model, path)
    keys = names or list(report.shapes[0])
    received = run(kind, path, dict(zip(keys, inputs, strict=True)))
    expected = model(*inputs) if names else model(inputs[0], training=False)
    assert_close(received["output_0"], expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_around(kind, tmp_path):
    """Constants, groups, gelu, dilations, strides beyond the kernel."""
    image = keras.Input((None, None, 4), name="image")
    mean, variance = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 1.0, 0.5]
    x = keras.layers.Normalization(mean=mean, variance=variance)(image)
    x = keras.layers.Conv2D(6, 3, groups=2, padding="same")(x)
    x = keras.layers.Activation("gelu")(x)
    x = keras.layers.Conv2D(6, 3, dilation_rate=2, padding="same")(x)
    x = keras.layers.Conv2D(6, 1, strides=2, padding="same")(x)
    x = DeformableConv2D(6, 2, strides=3, padding="same")(x)
    x = keras.layers.Conv2D(5, 2, strides=(3, 2), padding="same")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = randomise(keras.Model(image, x), 0.2)
    for size in ((40, 31), (37, 48)):
        assert_exports(kind, model, tmp_path / "model", random(2, *size, 4))


@pytest.mark.parametrize("kernel,stride", [(1, 4), (3, 8), (2, 5)])
def test_onnx_pads_where_strides_leave_pixels(kernel, stride, tmp_path):
    image = keras.Input((None, None, 3), name="image")
    x = DeformableConv2D(4, kernel, strides=stride, padding="same")(image)
    model = randomise(keras.Model(image, x))
    for height in range(stride, 2 * stride + 1):
        image = random(1, height, 23, 3, seed=height)
        assert_exports("onnx", model, tmp_path / "model", image)


@pytest.mark.parametrize("kind", FORMATS)
def test_loops(kind, tmp_path):
    layer = DeformableConv2D(2, 3, strides=1, padding="same")
    x = random(2, 8, 9, 2)
    layer(x)
    spec = tf.TensorSpec((None, None, None, 2), "float32", "x")

    @tf.function(input_signature=[spec])
    def function(x):
        for _ in tf.range(tf.shape(x)[0]):
            x = layer(x) + 0.5 * x
        return x

    assert_exports(kind, function, tmp_path / "model", x, names=["x"])


@pytest.mark.parametrize("kind", FORMATS)
def test_sequential_models_take_any_batch(kind, tmp_path):
    model = keras.Sequential([DeformableConv2D(3, 3), keras.layers.ReLU()])
    model(random(2, 8, 9, 2))
    assert_exports(kind, model, tmp_path / "model", random(5, 8, 9, 2))


@pytest.mark.parametrize("kind", FORMATS)
def test_classes(kind, tmp_path):
    """Of integers it counts how many differ, not by how much."""
    model = small_model((16, 20))
    logits = model.get_layer("deformable").output
    large = keras.ops.any(logits > 0.5, axis=-1)
    best = keras.ops.cast(keras.ops.top_k(logits, 1)[1], "int64")
    classes = keras.Model(model.inputs, {"large": large, "best": best})
    report = write(kind, classes, tmp_path / "model")
    assert set(report.differences) == {"large", "best"}
    image = random(3, 16, 20, 3)
    received = run(kind, tmp_path / "model", {"image": image})
    expected = classes(image, training=False)
    for name, value in expected.items():
        assert np.array_equal(received[name], value)


def test_names_that_meet(tmp_path):
    spec = tf.TensorSpec((None, 4), "float32", "x")
    path = tmp_path / "model"

    def function(outputs):
        return tf.function(outputs, [spec])

    twice = function(lambda x: {"a": [x + 1, x + 3], "a_0": x + 2})
    none = function(lambda x: {"a": x, "b": None})
    for bad in (twice, none, function(lambda x: {})):
        for kind in FORMATS:
            with pytest.raises(ValueError, match="Expected .*output"):
                write(kind, bad, path)
    with pytest.raises(ValueError, match="other names than the inputs'"):
        write("onnx", function(lambda x: {"x": 2 * x}), path)
    assert os.listdir(tmp_path) == []
    x = random(3, 4)
    for kind in FORMATS:
        # Passed through.
        path = tmp_path / kind
        write(kind, function(lambda x: [x, x]), path)
        received = run(kind, path, {"x": x})
        assert np.array_equal(received["output_0"], x)
        assert np.array_equal(received["output_1"], x)
        a = keras.Input((4,), name="self")
        b = keras.Input((4,), name="größe")
        c = keras.Input((4,), name="gr e")
        model = keras.Model([a, b, c], a + 2 * b + 3 * c)
        names = list(write(kind, model, path).shapes[0])
        assert len(set(names)) == 3
        values = [random(3, 4, seed=i) for i in range(3)]
        received = run(kind, path, dict(zip(names, values, strict=True)))
        assert_close(received["output_0"], model(values))


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
    """The number that is reported, and what is no number."""
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


def test_native_models_need_native_ops(run_python, tmp_path):
    """What needs them says so, and what does not does without."""
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
