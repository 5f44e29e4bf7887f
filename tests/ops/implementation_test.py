# SPDX-License-Identifier: Apache-2.0
"""Tests which implementation runs: as asked for, or without the library."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import EXACT, assert_close, assert_equal
from layer_cases import ONE_OF_EACH, displaced, new, own_call
from tolerances import ANOTHER_ORDER
from traced import implementations as runs

import tf_deform
from tf_deform import _loader, layers, ops

PACKAGE = pathlib.Path(tf_deform.__file__).parent

OPERANDS = [
    np.ones((1, 5, 5, 2), np.float32),
    np.ones((3, 3, 2, 4), np.float32),
    np.zeros((1, 3, 3, 18), np.float32),
]


def test_the_context_wins_over_the_argument():
    def run(**options):
        return runs(lambda: ops.deformable_conv2d(*OPERANDS, **options))

    assert run() == {"native"}
    assert run(implementation="portable") == {"portable"}
    with tf_deform.implementation("portable"):
        assert run() == {"portable"}
        assert run(implementation="native") == {"portable"}
        with tf_deform.implementation("native"):
            assert run(implementation="portable") == {"native"}
        assert run() == {"portable"}
    assert run() == {"native"}
    with pytest.raises(KeyError), tf_deform.implementation("portable"):
        raise KeyError
    assert run() == {"native"}


def test_what_was_traced_stays_as_it_is():
    function = tf.function(lambda: ops.deformable_conv2d(*OPERANDS))
    expected = function()
    with tf_deform.implementation("portable"):
        assert_equal(function(), expected)
        assert len(function._list_all_concrete_functions()) == 1


@pytest.mark.parametrize(("kind", "config"), ONE_OF_EACH)
def test_layers_keep_their_implementation(kind, config):
    layer = displaced(kind, implementation="portable", **config)
    call = own_call(kind)
    expected = layer(**call)
    native = new(kind, **config)
    assert native.get_config()["implementation"] == "native"
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    for other, implementation, tolerance in (
        (copy, "portable", EXACT),
        (native, "native", ANOTHER_ORDER),
    ):
        other(**call)
        other.set_weights(layer.get_weights())
        assert other.implementation == implementation
        assert runs(lambda other=other: other(**call)) == {implementation}
        assert_close(other(**call), expected, tolerance)
    with tf_deform.implementation("portable"):
        assert runs(lambda: native(**call)) == {"portable"}


# Without the library, or by the environment's setting.


_OTHER_PACKAGE = """
sys.path.insert(0, sys.argv[1])
# An editable installation would find in the source tree what the copy lacks.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tf_deform
    layer = tf_deform.layers.DeformableConv2D(2, 3)
    layer(np.ones((1, 4, 4, 2), "float32"))
    tf_deform.layers.DeformableROIAlign(2, 1)(
        np.ones((1, 4, 4, 2), "float32"), np.ones((1, 5), "float32"))
assert tf_deform.__file__.startswith(sys.argv[1])
for warning in caught:
    if "tf_deform" in str(warning.message):
        print(warning.category.__name__, warning.message)
print("CUDA", tf_deform.is_built_with_cuda())
rng = np.random.default_rng(0)
output = tf_deform.ops.deformable_conv2d(
    rng.normal(size=(1, 5, 5, 2)), rng.normal(size=(3, 3, 2, 4)),
    rng.normal(size=(1, 3, 3, 18)))
print(f"sum {np.abs(output).sum():.6f}")
try:
    with tf_deform.implementation("native"):
        print("native")
except RuntimeError as error:
    print("RuntimeError", error)
"""
# Runs a SavedModel, and then imports a package without the library.
_BARE_PROCESS = """
if len(sys.argv) > 2:
    model = tf.saved_model.load(sys.argv[2] + "/model")
    with np.load(sys.argv[2] + "/expected.npz") as file:
        for size in "ab":
            outputs = model.serve(file["images_" + size], file["rois"])
            for index, output in enumerate(outputs):
                np.testing.assert_allclose(
                    output, file[f"{index}_{size}"], rtol=1e-4, atol=1e-4)
    assert "tf_deform" not in sys.modules
    print("a model without the package: same")
"""


# Runs a script with each list of arguments, in copies of this process, which
# has imported TensorFlow and has not used it. The import takes seconds.
_FORKS = """
import json, os, sys, warnings
import numpy as np
import tensorflow as tf
script, runs = map(json.loads, sys.argv[1:])
for environment, arguments, path in runs:
    child = os.fork()
    if not child:
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        exec(script)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, open(path).read()
"""


def copy_without_library(folder, libraries):
    """Copies the package, with another list of its libraries."""
    shutil.copytree(
        PACKAGE, folder / "tf_deform", ignore=shutil.ignore_patterns("*.so")
    )
    with open(folder / "tf_deform/_build_info.py", "a") as file:
        file.write(libraries)
    return folder


def write_portable_model(tmp_path):
    """Writes a SavedModel of all layers, and what it has to return."""
    images, rois = keras.Input((None, None, 12)), keras.Input((5,))
    conv = layers.DeformableConv2D(3, 3, modulation="sigmoid")(images)
    psroi_pooling = layers.DeformablePSROIPooling(3, 2, 0.5)
    outputs = [
        conv,
        psroi_pooling(images, rois, trans_inputs=conv),
        layers.DeformableROIPooling(2, 0.5, units=(4,))(images, rois),
        layers.DeformableROIAlign(2, 0.5)(images, rois),
    ]
    model = keras.Model([images, rois], outputs)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.2, weight.shape))
    arrays = {
        "images_a": np.float32(rng.normal(size=(2, 9, 8, 12))),
        "images_b": np.float32(rng.normal(size=(1, 5, 13, 12))),
        "rois": np.float32([[0, 1, 2, 11, 12], [0, -3, 0, 9, 7], [-1] * 5]),
    }
    for size in "ab":
        results = model([arrays[f"images_{size}"], arrays["rois"]])
        for index, result in enumerate(results):
            arrays[f"{index}_{size}"] = result.numpy()
    np.savez(tmp_path / "expected.npz", **arrays)
    with tf_deform.implementation("portable"):
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint(
            "serve",
            lambda images, rois: model([images, rois]),
            input_signature=[
                tf.TensorSpec((None, None, None, 12)),
                tf.TensorSpec((None, 5)),
            ],
        )
        archive.write_out(tmp_path / "model", verbose=False)
    return tmp_path


def expected_sum() -> str:
    rng = np.random.default_rng(0)
    output = ops.deformable_conv2d(
        rng.normal(size=(1, 5, 5, 2)),
        rng.normal(size=(3, 3, 2, 4)),
        rng.normal(size=(1, 3, 3, 18)),
    )
    return f"sum {np.abs(output).sum():.6f}"


@pytest.fixture(scope="module")
def printed(tmp_path_factory, run_python):
    """Returns what processes print that have no library, by their name."""
    folder = tmp_path_factory.mktemp("without_library")
    missing = copy_without_library(folder / "missing", "LIBRARIES = {}")
    misfit = copy_without_library(
        folder / "misfit", 'LIBRARIES = {"2.4": ("2.4.1", True)}'
    )
    library = misfit / "tf_deform" / pathlib.Path(_loader.LIBRARY).name
    library.write_bytes(b"not a library")
    portable = {"TF_DEFORM_IMPLEMENTATION": "portable"}
    model = write_portable_model(folder)
    files = [folder / "missing.txt", folder / "misfit.txt"]
    runs = [
        ({}, [str(missing), str(model)], str(files[0])),
        (portable, [str(misfit)], str(files[1])),
    ]
    script = _BARE_PROCESS + _OTHER_PACKAGE
    run_python(_FORKS, json.dumps(script), json.dumps(runs))
    return {file.stem: file.read_text() for file in files}


def test_without_package_or_library(printed):
    """Tests that a portable model runs, and that the package warns once."""
    text = printed["missing"]
    assert "a model without the package: same" in text
    assert text.count("RuntimeWarning") == 1
    assert "Expected the native ops of tf_deform at" in text
    assert "pip install" in text
    assert "CUDA False" in text
    assert expected_sum() in text
    assert "RuntimeError Expected native ops" in text


def test_portable_next_to_another_tensorflow(printed):
    """Tests "portable" where the library would not fit: it is not loaded."""
    assert "Warning" not in printed["misfit"]
    assert expected_sum() in printed["misfit"]


def test_native_is_asked_for_and_missing(monkeypatch):
    monkeypatch.setattr(_loader, "LIBRARY", "/nowhere/_ops_2.21.so")
    monkeypatch.setattr(_loader, "forced", lambda: "native")
    with pytest.raises(
        ImportError,
        match="(?s)Expected the native ops.*unset TF_DEFORM_IMPLEMENTATION",
    ):
        _loader.op_library.__wrapped__()


def test_values_of_the_environment(monkeypatch):
    forced = _loader.forced.__wrapped__
    for value, expected in (
        (None, None),
        ("", None),
        ("native", "native"),
        ("portable", "portable"),
    ):
        monkeypatch.delenv(_loader.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(_loader.VARIABLE, value)
        assert forced() == expected
    monkeypatch.setenv(_loader.VARIABLE, "fast")
    with pytest.raises(
        ValueError,
        match="Expected the environment variable TF_DEFORM_IMPLEMENTATION"
        ".*Received: 'fast'",
    ):
        forced()


def test_the_environment_wins_over_the_argument(monkeypatch):
    """Tests that the context, which is nearer, wins over the environment."""
    monkeypatch.setattr(_loader, "forced", lambda: "native")

    def run():
        return ops.deformable_conv2d(*OPERANDS, implementation="portable")

    assert runs(run) == {"native"}
    with tf_deform.implementation("portable"):
        assert runs(run) == {"portable"}
