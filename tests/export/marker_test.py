# SPDX-License-Identifier: Apache-2.0
"""Tests the op in exported graphs whose name explains the missing library."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported import randomise
from operands import random
from tensorflow.core.protobuf import saved_model_pb2

import tf_deform
from tf_deform import _implementation, _loader, layers

# The name is in users' SavedModels, so it must not change.
MARKER = "TfDeform>ImportTfDeformOrLoadItsOpLibrary"
ROIS = np.float32([[0, 1, 2, 9, 12], [1, 4, 0, 14, 7], [-1, 0, 0, 9, 9]])


def convolve(inputs):
    """Convolves images of 4 channels to 4 channels, deformably."""
    shape = tf.shape(inputs)
    offset = tf.fill(tf.concat([shape[:3], [18]], 0), 0.3)
    return tf_deform.ops.deformable_conv2d(
        inputs, random(3, 3, 4, 4), offset, padding="same"
    )


def nested(inputs):
    """Makes a function that calls a function and convolves afterwards."""
    inner = tf.function(lambda x: convolve(x) + 1)
    return convolve(tf.function(lambda x: inner(x) * 2)(inputs))


def branches(inputs):
    return tf.cond(
        tf.reduce_sum(inputs) > 1e9,
        lambda: convolve(inputs),
        lambda: convolve(inputs + 1),
    )


def loop(inputs):
    return tf.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, convolve(x)), (0, inputs)
    )[1]


IMAGE = random(2, 15, 14, 4)
CASES = {
    "function": convolve,
    "nested": nested,
    "branches": branches,
    "loop": loop,
}
NAMES = [*CASES, "layers"]


def all_layers():
    """Makes a model of all layers, each with its own branch."""
    image = keras.Input((None, None, 4))
    rois = keras.Input((5,))
    x = layers.DeformableConv2D(8, 3, padding="same", modulation="2sigmoid")(
        image
    )
    psroi = layers.DeformablePSROIPooling(2, 2, 1.0)
    pooled = [
        psroi(x, rois, trans_inputs=x),
        layers.DeformableROIPooling(2, 1.0)(x, rois),
        layers.DeformableROIAlign(2, 1.0)(x, rois),
    ]
    pooled = keras.layers.Concatenate()(pooled)
    return randomise(keras.Model([image, rois], pooled), 0.1)


def export(name, folder, context):
    """Exports under `context`; returns the result for `IMAGE`."""
    if name == "layers":
        model = all_layers()
        with context:
            model.export(folder, verbose=False)
        return model([IMAGE, ROIS]).numpy()
    function, module = CASES[name], tf.Module()
    specs = [tf.TensorSpec((None, None, None, 4), name="image")]
    with context:
        module.serve = tf.function(function, specs)
        tf.saved_model.save(module, folder)
    return tf.function(function)(IMAGE).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Makes a folder with all cases, and the expected results."""
    folder = tmp_path_factory.mktemp("exported")
    results = {
        name: export(name, folder / name, _implementation.explaining())
        for name in NAMES
    }
    # A model without the marker shows that the text comes from the marker.
    unmarked = export("function", folder / "unmarked", contextlib.nullcontext())
    np.savez(folder / "arguments.npz", image=IMAGE, rois=ROIS)
    return folder, results | {"unmarked": unmarked}


@pytest.mark.parametrize("name", NAMES)
def test_every_function_begins_with_it(name, exported):
    """Tests the op's place. TensorFlow looks ops up in this order."""
    folder, results = exported
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / name / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    assert not any(node.op.startswith("TfDeform>") for node in graph.node)
    found = [
        [node.op for node in function.node_def if "TfDeform>" in node.op]
        for function in graph.library.function
    ]
    found = [ops for ops in found if ops]
    assert found
    for ops in found:
        assert ops[0] == MARKER
        assert len(ops) > 1
        assert MARKER not in ops[1:]
    # The package is imported here, so the model loads.
    model = tf.saved_model.load(folder / name)
    received = model.serve([IMAGE, ROIS] if name == "layers" else IMAGE)
    np.testing.assert_array_equal(received, results[name])


# Arguments: the folder of the models, the library, names. Prints the errors of
# TensorFlow without the library, and writes results with it.
BARE = """
import sys

sys.modules["tf_deform"] = None
import numpy as np
import tensorflow as tf

folder, library, *names = sys.argv[1:]
for name in names:
    try:
        tf.saved_model.load(f"{folder}/{name}")
        print(name, "loaded")
    except Exception as error:
        print(name, str(error).splitlines()[0])
tf.load_op_library(library)
image, rois = np.load(f"{folder}/arguments.npz").values()
results = {}
for name in names:
    model = tf.saved_model.load(f"{folder}/{name}")
    results[name] = model.serve([image, rois] if name == "layers" else image)
np.savez(f"{folder}/results.npz", **results)
"""


def test_without_the_package(exported, run_python):
    """Tests that following the error's advice is enough."""
    folder, results = exported
    printed = run_python(BARE, folder, _loader.LIBRARY, *results).splitlines()
    received = np.load(folder / "results.npz")
    for name, line in zip(results, printed, strict=True):
        op = "TfDeform>DeformableConv2D" if name == "unmarked" else MARKER
        assert line.startswith(f"{name} Op type not registered '{op}'"), line
        np.testing.assert_array_equal(received[name], results[name])


def markers(function, *operands):
    graph = tf.function(function).get_concrete_function(*operands).graph
    return sum(node.type == MARKER for node in graph.get_operations())


def test_only_native_ops_in_graphs_are_marked():
    image = random(1, 5, 6, 4)
    assert markers(convolve, image) == 0
    with _implementation.explaining():
        assert markers(lambda x: convolve(convolve(x)), image) == 1
        assert markers(lambda x: x + 1, image) == 0
        with tf_deform.implementation("portable"):
            assert markers(convolve, image) == 0
        # The functions were traced before.
        convolve(image)
    assert markers(convolve, image) == 0


def test_it_never_runs():
    """Tests that TensorFlow prunes the op. Serving costs nothing more."""
    v1 = tf.compat.v1
    received = v1.RunMetadata()
    with v1.Session(graph=tf.Graph()) as session:
        image = v1.placeholder(tf.float32, (1, 5, 6, 4))
        with _implementation.explaining():
            output = convolve(tf.function(nested)(image))
        session.run(
            output,
            {image: random(1, 5, 6, 4)},
            options=v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE),
            run_metadata=received,
        )
    ran = [
        f"{node.node_name} {node.timeline_label}"
        for device in received.step_stats.dev_stats
        for node in device.node_stats
    ]
    assert any("TfDeform>DeformableConv2D" in name for name in ran)
    assert not any(MARKER in name for name in ran)


def test_it_runs_where_it_is_not_pruned():
    """Tests eager mode, and a caller who asks for the op itself."""
    marker = (
        _loader.op_library().tf_deform_import_tf_deform_or_load_its_op_library
    )
    assert marker() is None

    @tf.function
    def function(x):
        with tf.control_dependencies([marker()]):
            return x + 1

    assert function(tf.constant(1)) == 2


@pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)
@pytest.mark.parametrize("name", CASES)
def test_inside_xla(name):
    with _implementation.explaining():
        compiled = tf.function(CASES[name], jit_compile=True)
        graph = compiled.get_concrete_function(IMAGE).graph.as_graph_def()
    assert MARKER in str(graph)
    plain = tf.function(CASES[name], jit_compile=True)
    np.testing.assert_array_equal(compiled(IMAGE), plain(IMAGE))
