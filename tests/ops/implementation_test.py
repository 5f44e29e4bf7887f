# SPDX-License-Identifier: Apache-2.0
"""Tests which implementation runs.

Argument, context, environment, no library.
"""

import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
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


@pytest.mark.parametrize("value", ["Native", "", None, 1, "xla"])
def test_another_implementation(value):
    def check(function):
        with pytest.raises(ValueError) as info:
            function()
        assert 'Expected `implementation` to be "native" or "portable"' in str(
            info.value
        )
        assert f"Received: {value!r}" in str(info.value)

    check(lambda: tf_deform.implementation(value).__enter__())
    check(lambda: ops.deformable_conv2d(*OPERANDS, implementation=value))
    for make in LAYERS.values():
        check(lambda make=make: make(implementation=value))


LAYERS = {
    "conv2d": lambda **kwargs: layers.DeformableConv2D(
        3, 3, modulation="sigmoid", **kwargs
    ),
    "psroi_pooling": lambda **kwargs: layers.DeformablePSROIPooling(
        3, 2, 0.5, **kwargs
    ),
    "roi_pooling": lambda **kwargs: layers.DeformableROIPooling(
        2, 0.5, units=(4,), **kwargs
    ),
    "roi_align": lambda **kwargs: layers.DeformableROIAlign(2, 0.5, **kwargs),
}


def call_layer(layer):
    rng = np.random.default_rng(0)
    inputs = np.float32(rng.normal(size=(2, 7, 8, 12)))
    if isinstance(layer, layers.DeformableConv2D):
        return layer(inputs)
    rois = np.float32([[0, 1, 2, 11, 12], [1, -3, 0, 9, 7], [-1, 0, 0, 0, 0]])
    if isinstance(layer, layers.DeformablePSROIPooling):
        return layer(inputs, rois, trans_inputs=inputs)
    return layer(inputs, rois)


def randomise(layer):
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(rng.normal(0, 0.2, weight.shape))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_their_implementation(name):
    assert LAYERS[name]().get_config()["implementation"] == "native"
    layer = LAYERS[name](implementation="portable")
    expected = call_layer(layer)
    randomise(layer)
    expected = call_layer(layer)
    config = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.implementation == "portable"
    call_layer(copy)
    copy.set_weights(layer.get_weights())
    assert runs(lambda: call_layer(copy)) == {"portable"}
    assert_equal(call_layer(copy), expected)
    native = LAYERS[name]()
    call_layer(native)
    native.set_weights(layer.get_weights())
    assert runs(lambda: call_layer(native)) == {"native"}
    assert_close(call_layer(native), expected, ANOTHER_ORDER)
    with tf_deform.implementation("portable"):
        assert runs(lambda: call_layer(native)) == {"portable"}


# Without the library, or by the environment's setting.


@pytest.fixture
def package_without_library(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "tf_deform", ignore=shutil.ignore_patterns("*.so")
    )
    return tmp_path


OTHER_PACKAGE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
# An editable installation would find in the source tree what the copy lacks.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        import tf_deform
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
        sys.exit()
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


def expected_sum() -> str:
    rng = np.random.default_rng(0)
    output = ops.deformable_conv2d(
        rng.normal(size=(1, 5, 5, 2)),
        rng.normal(size=(3, 3, 2, 4)),
        rng.normal(size=(1, 3, 3, 18)),
    )
    return f"sum {np.abs(output).sum():.6f}"


def test_without_a_library_one_warning(run_python, package_without_library):
    printed = run_python(OTHER_PACKAGE, package_without_library)
    assert printed.count("RuntimeWarning") == 1
    assert "Expected the native ops of tf_deform at" in printed
    assert "pip install" in printed
    assert "CUDA False" in printed
    assert expected_sum() in printed
    assert "RuntimeError Expected native ops" in printed


def test_portable_next_to_another_tensorflow(
    run_python, package_without_library
):
    """Tests "portable" where the library would not fit: it is not loaded."""
    folder = package_without_library / "tf_deform"
    info = (folder / "_build_info.py").read_text().splitlines()
    info = [
        'TENSORFLOW_VERSION = "2.4.1"' if "TENSORFLOW" in line else line
        for line in info
    ]
    (folder / "_build_info.py").write_text("\n".join(info))
    (folder / "_ops.so").write_bytes(b"not a library")
    printed = run_python(
        OTHER_PACKAGE,
        package_without_library,
        TF_DEFORM_IMPLEMENTATION="portable",
    )
    assert "Warning" not in printed
    assert expected_sum() in printed


def test_native_is_asked_for_and_missing(monkeypatch):
    monkeypatch.setattr(_loader, "LIBRARY", "/nowhere/_ops.so")
    monkeypatch.setattr(_loader, "forced", lambda: "native")
    with pytest.raises(ImportError) as info:
        _loader.op_library.__wrapped__()
    assert "Expected the native ops" in str(info.value)
    assert "unset TF_DEFORM_IMPLEMENTATION" in str(info.value)


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
    with pytest.raises(ValueError) as info:
        forced()
    assert "Expected the environment variable TF_DEFORM_IMPLEMENTATION" in str(
        info.value
    )
    assert "Received: 'fast'" in str(info.value)


def test_the_environment_wins_over_the_argument(monkeypatch):
    """Tests that the context, which is nearer, wins over the environment."""
    monkeypatch.setattr(_loader, "forced", lambda: "native")

    def run():
        return ops.deformable_conv2d(*OPERANDS, implementation="portable")

    assert runs(run) == {"native"}
    with tf_deform.implementation("portable"):
        assert runs(run) == {"portable"}


# A model that runs without this package.

WITHOUT_TF_DEFORM = """
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
with np.load(sys.argv[2]) as file:
    for size in ("a", "b"):
        outputs = model.serve(file["images_" + size], file["rois"])
        for name, output in zip(("conv", "psroi", "roi", "align"), outputs):
            np.testing.assert_allclose(
                output, file[name + "_" + size], rtol=1e-4, atol=1e-4)
assert "tf_deform" not in sys.modules
print("same")
"""


def test_a_portable_saved_model_runs_without_the_package(tmp_path, run_python):
    images = keras.Input((None, None, 12))
    rois = keras.Input((5,))
    conv = LAYERS["conv2d"]()(images)
    outputs = [
        conv,
        LAYERS["psroi_pooling"]()(images, rois, trans_inputs=conv),
        LAYERS["roi_pooling"]()(images, rois),
        LAYERS["roi_align"]()(images, rois),
    ]
    model = keras.Model([images, rois], outputs)
    randomise(model)
    rng = np.random.default_rng(0)
    arrays = {
        "images_a": np.float32(rng.normal(size=(2, 9, 8, 12))),
        "images_b": np.float32(rng.normal(size=(1, 5, 13, 12))),
        "rois": np.float32([[0, 1, 2, 11, 12], [0, -3, 0, 9, 7], [-1] * 5]),
    }
    for size in ("a", "b"):
        results = model([arrays[f"images_{size}"], arrays["rois"]])
        for name, result in zip(
            ("conv", "psroi", "roi", "align"), results, strict=True
        ):
            arrays[f"{name}_{size}"] = result.numpy()
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
    printed = run_python(
        WITHOUT_TF_DEFORM, tmp_path / "model", tmp_path / "expected.npz"
    )
    assert "same" in printed
