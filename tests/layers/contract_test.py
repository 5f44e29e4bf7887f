# SPDX-License-Identifier: Apache-2.0
"""Tests the promises of all four layers to Keras.

The values of a layer are tested in its own file, types in types_test.py, data
formats and shapes in data_format_test.py, NaN in nan_test.py.
"""

import copy
import inspect
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from keras.src import testing
from layer_cases import (
    BRANCHES,
    DENSE,
    EVERY_CALL,
    KINDS,
    ONE_OF_EACH,
    POOLS,
    SOURCES,
    built,
    displace,
    displaced,
    fit,
    given_call,
    in_mode,
    loss_of,
    model_of,
    new,
    output_shape,
    own_call,
    regions,
    symbols,
)
from operands import random

from tf_deform import _loader

every_kind = pytest.mark.parametrize("kind", KINDS)
every_branch = pytest.mark.parametrize(("kind", "config"), BRANCHES, ids=str)
one_of_each = pytest.mark.parametrize(("kind", "config"), ONE_OF_EACH, ids=str)


def outputs_of(kind: str, seed: int = 0) -> np.ndarray:
    """Returns numbers that a layer could be trained to return."""
    return random(*output_shape(kind), seed=seed)


# Configuration and copies.

_LAST = "data_format=None, implementation='native', **kwargs)"
# The constructors of the design; the convolution's is that of Keras, and more.
SIGNATURES = {
    "psroi": "(output_dim, pooled_size, spatial_scale, group_size=None, "
    "part_size=None, sample_per_part=4, trans_std=0.1, num_classes=1, " + _LAST,
    "pool": "(pooled_size, spatial_scale, sample_per_part=4, trans_std=0.1, "
    "units=(), " + _LAST,
    "align": "(pooled_size, spatial_scale, sampling_ratio=0, gamma=0.1, "
    "units=(), modulation=None, " + _LAST,
}
# No argument is called `mask`: Keras fills it from its own masks.
CALL_SIGNATURES = {
    "conv2d": "(self, inputs, offset=None, modulator=None)",
    "psroi": "(self, inputs, rois, trans=None, trans_inputs=None)",
    "pool": "(self, inputs, rois, offset=None)",
    "align": "(self, inputs, rois, offset=None)",
}


def text_of_signature(function: object) -> str:
    """Returns names and defaults, without types."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(
        signature.replace(
            parameters=parameters, return_annotation=signature.empty
        )
    )


@every_kind
def test_signatures(kind):
    layer = KINDS[kind].layer
    assert text_of_signature(layer.call) == CALL_SIGNATURES[kind]
    if kind in SIGNATURES:
        assert text_of_signature(layer) == SIGNATURES[kind]
        return
    theirs = text_of_signature(keras.layers.Conv2D).removesuffix("**kwargs)")
    assert text_of_signature(layer) == theirs + (
        "offset_groups=1, modulation=None, boundary='zeros', "
        "offset_dilation_rate=None, implementation='native', "
        "freeze_kernel=False, **kwargs)"
    )


_OTHERS = {"data_format": "channels_first", "implementation": "portable"}
EVERYTHING = {
    "conv2d": {
        "filters": 6,
        "kernel_size": (3, 2),
        "strides": (2, 1),
        "padding": ((1, 0), (2, 1)),
        "dilation_rate": (1, 2),
        "groups": 2,
        "activation": "tanh",
        "use_bias": True,
        "kernel_initializer": keras.initializers.HeNormal(seed=7),
        "bias_initializer": "ones",
        "kernel_regularizer": keras.regularizers.L2(0.25),
        "bias_regularizer": "l1",
        "activity_regularizer": keras.regularizers.L1(0.5),
        "kernel_constraint": keras.constraints.MaxNorm(3.0),
        "bias_constraint": "non_neg",
        "offset_groups": 3,
        "modulation": "2sigmoid",
        "boundary": "clamp",
        "offset_dilation_rate": (2, 1),
        "freeze_kernel": True,
    },
    **{kind: KINDS[kind].config for kind in POOLS},
}


def through_json(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a copy of the same class, made from JSON text."""
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert stored["registered_name"] == f"tf_deform>{type(layer).__name__}"
    clone = keras.saving.deserialize_keras_object(stored)
    assert type(clone) is type(layer)
    assert clone.get_config() == layer.get_config()
    return clone


@every_kind
def test_config_holds_every_argument(kind):
    cls = KINDS[kind].layer
    more = {"name": "all", "dtype": "mixed_bfloat16", "trainable": False}
    everything = {**EVERYTHING[kind], **_OTHERS, **more}
    if kind in DENSE:
        everything["units"] = (8, 4)
    if kind == "align":
        everything["modulation"] = "sigmoid"
    constructor = inspect.signature(cls).parameters
    assert {*constructor, *more} == {*everything, "kwargs"}
    layer = cls(**everything)
    config = layer.get_config()
    assert everything.keys() <= config.keys()
    for name, value in everything.items():
        if name != "dtype" and not isinstance(config[name], dict):
            assert config[name] == value, name
    for clone in (cls.from_config(config), through_json(layer)):
        assert clone.get_config() == config
        assert clone.name == "all" and not clone.trainable
        assert clone.compute_dtype == "bfloat16"


PADDINGS = ["valid", "same", "SAME", 0, 2, (2, 1), ((0, 1), (3, 2))]
PADDINGS += [[[0, 1], [3, 2]]]


def from_json(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a copy with weights; it is built before it is called."""
    clone = through_json(layer)
    assert clone.built and len(clone.weights) == len(layer.weights)
    if isinstance(layer, KINDS["conv2d"].layer):
        assert clone.padding == layer.padding
    clone.set_weights(layer.get_weights())
    return clone


def from_pickle(layer: keras.layers.Layer) -> keras.layers.Layer:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [from_json, from_pickle, copy.deepcopy])
@pytest.mark.parametrize(
    ("kind", "source", "config"),
    EVERY_CALL + [("conv2d", "own", {"padding": side}) for side in PADDINGS],
    ids=str,
)
def test_copies(kind, source, config, copied):
    layer, call = built(kind, source, **config)
    clone = copied(layer)
    assert clone is not layer
    expected = layer(**call)
    assert_equal(clone(**call), expected)
    for weight in clone.weights:
        weight.assign(0 * weight)
    assert_equal(layer(**call), expected)


# Saving and loading models.


def functional_model() -> keras.Model:
    """Makes a model of all layers with all sources of displacements."""
    inputs = keras.Input((None, None, 6))
    rois = keras.Input((5,))

    def features(channels, x=inputs):
        return keras.layers.Conv2D(channels, 3, padding="same")(x)

    own = {
        "conv2d": new(
            "conv2d", padding=1, groups=2, activation="tanh", name="own_conv2d"
        ),
        "psroi": new("psroi", name="own_psroi"),
        "pool": new("pool", units=(8, 4), name="own_pool"),
        "align": new("align", name="own_align"),
    }
    convolved = own["conv2d"](inputs)
    outputs = [
        own["psroi"](features(36), rois, trans_inputs=features(5)),
        own["pool"](inputs, rois),
        own["align"](inputs, rois),
        new("psroi", name="plain_psroi")(features(36), rois),
    ]
    moves = keras.layers.Dense(2)(outputs[1])
    outputs += [
        new("pool")(inputs, rois, moves),
        new("align")(inputs, rois, offset=moves),
        new("psroi", part_size=None)(features(36), rois, trans=moves),
    ]
    given = new("conv2d", kernel_size=1, offset_groups=2, boundary="clamp")
    outputs += [convolved, given(convolved, offset=1.5 + features(4))]
    model = keras.Model([inputs, rois], outputs)
    for layer in own.values():
        displace(layer)
    return model


def model_call() -> list[np.ndarray]:
    return [random(2, 11, 12, 6), regions()]


def assert_equal_outputs(actual: list, expected: list) -> None:
    assert len(expected) == 9
    for output in expected:
        assert np.std(output) > 0.1
    assert_equal(list(actual), list(expected), name="outputs")


_LOAD = """
import sys
import numpy as np
import keras
import tensorflow as tf
import tf_deform

with np.load(sys.argv[1] + "/calls.npz") as file:
    calls = [file["arr_0"], file["arr_1"]]
model = keras.saving.load_model(sys.argv[1] + "/model.keras")
np.savez(sys.argv[1] + "/keras.npz", *model.predict_on_batch(calls))
model = tf.saved_model.load(sys.argv[1] + "/model")
np.savez(sys.argv[1] + "/saved_model.npz", *model.serve(calls))
"""


def test_a_fresh_process_loads_the_model(tmp_path, run_python):
    """Tests that `import tf_deform` suffices for both kinds of files."""
    model = functional_model()
    expected = model.predict_on_batch(model_call())
    np.savez(tmp_path / "calls.npz", *model_call())
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "model", verbose=False)
    run_python(_LOAD, tmp_path)
    for form in ("keras", "saved_model"):
        with np.load(tmp_path / f"{form}.npz") as file:
            assert_equal_outputs(list(file.values()), expected)
    served = tf.saved_model.load(tmp_path / "model")
    for images, count in [(1, 0), (3, 4), (2, 1)]:
        call = [random(images, 9 + images, 14, 6), regions(count)]
        call[1][:, 0] %= images
        actual, expected = served.serve(call), model(call)
        assert actual[0].shape == (count, 3, 4, 6)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_weights_of_a_model_in_others(tmp_path):
    """Loads a file into a model of other numbers, and clones the model."""
    model = functional_model()
    expected = model(model_call())
    model.save_weights(tmp_path / "model.weights.h5")
    other = functional_model()
    for variable in other.weights:
        variable.assign(np.full(variable.shape, 0.25))
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal_outputs(other(model_call()), expected)
    clone = keras.models.clone_model(model)
    assert [v.path for v in clone.weights] == [v.path for v in model.weights]
    assert [v.shape for v in clone.weights] == [v.shape for v in model.weights]
    clone.set_weights(model.get_weights())
    assert_equal_outputs(clone(model_call()), expected)


@every_kind
def test_weights_with_and_without_a_branch_are_not_mixed_up(kind, tmp_path):
    models = [
        model_of(new(kind), call) for call in (own_call(kind), given_call(kind))
    ]
    text = "expected [02] variables"
    if kind == "conv2d":
        text = "Expected weights .* branch"
    for source, other in (models, models[::-1]):
        source.save_weights(tmp_path / "model.weights.h5")
        with pytest.raises(ValueError, match=text):
            other.load_weights(tmp_path / "model.weights.h5")


@one_of_each
def test_a_layer_in_two_models(kind, config):
    """Tests that the second call uses the same layer and weights."""
    layer, call = built(kind, "own", **config)
    expected = layer(**call)
    for size in (None, call["inputs"].shape[1]):
        inputs = symbols(call)
        inputs["inputs"] = keras.Input(
            (size, *call["inputs"].shape[2:]), name="inputs"
        )
        model = keras.Model(inputs, layer(**inputs))
        assert [id(v) for v in model.weights] == [id(v) for v in layer.weights]
        assert_equal(model(call), expected)


@keras.saving.register_keras_serializable(package="contract_test")
class Head(keras.Model):
    """Keeps its layers in a list, in a subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moves = keras.layers.Dense(2)
        self.first = new("conv2d", filters=6, padding="same")
        self.pools = [
            new("psroi", output_dim=1, num_classes=1),
            new("pool", units=(8,)),
            new("align"),
        ]

    def call(self, arguments):
        inputs, rois = arguments
        maps = self.first(inputs)
        x = self.pools[0](inputs, rois, trans_inputs=maps)
        y = self.pools[1](maps, rois)
        return x + y + self.pools[2](inputs, rois, self.moves(y))


def test_subclassed_model(tmp_path):
    model, call = Head(), model_call()
    model(call)
    for layer in (model.first, *model.pools[:2]):
        displace(layer)
    assert len(model.weights) == 2 + 4 + 2 + 4 + 0
    expected = model(call)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(loaded(call), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    other = Head()
    other(call)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(other(call), expected)


# Training.


@every_branch
def test_fit_decreases_the_loss_and_moves_every_weight(kind, config):
    call = own_call(kind)
    call["inputs"] = np.cumsum(np.cumsum(call["inputs"], 1), 2) / 10
    target = displaced(kind, **config)(**call)
    layer = new(kind, **config)
    model = model_of(layer, call)
    displace(layer, seed=1)
    before = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.003), "mse")
    loss = loss_of(model, call, target)
    fit(model, call, target, steps=20)
    assert loss_of(model, call, target) < 0.95 * loss
    for old, after in zip(before, layer.get_weights(), strict=True):
        assert np.any(old != after)


@one_of_each
def test_a_frozen_layer_stays_as_it_is(kind, config):
    call = own_call(kind)
    inputs = symbols(call)
    layer = new(kind, trainable=False, **config)
    outputs = keras.layers.Dense(1)(layer(**inputs))
    model = keras.Model(inputs, outputs)
    displace(layer)
    assert layer.trainable_weights == []
    assert len(layer.non_trainable_weights) == (2 if kind == "psroi" else 4)
    before = layer.get_weights()
    model.compile("sgd", "mse")
    fit(model, call, outputs_of(kind)[..., :1])
    assert_equal(layer.get_weights(), before)
    assert len(model.trainable_weights) == 2


def trained(kind: str, config: dict, steps: int = 1, **arguments) -> tuple:
    """Returns weights before training, and weights and predictions after."""
    keras.utils.set_random_seed(3)
    call, layer = own_call(kind), new(kind, **config)
    model = model_of(layer, call)
    displace(layer)
    before = layer.get_weights()
    model.compile(loss="mse", **arguments)
    assert model.jit_compile is arguments.get("jit_compile", model.jit_compile)
    fit(model, call, outputs_of(kind), steps)
    return before, layer.get_weights(), model.predict_on_batch(call)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@one_of_each
def test_mixed_training_updates_float32_weights(kind, config, policy):
    keras.config.set_dtype_policy(policy)
    before, weights, _ = trained(kind, config, optimizer="adam")
    for old, after in zip(before, weights, strict=True):
        assert after.dtype == np.float32
        assert np.all(np.isfinite(after)) and np.any(after != old)


@one_of_each
def test_training_is_deterministic_and_the_same_inside_xla(kind, config):
    """Trains and predicts, also with XLA."""
    results = [trained(kind, config, 3, optimizer="sgd") for _ in range(2)]
    assert_equal(*results)
    if _loader.supports_jit():
        inside = trained(kind, config, 3, optimizer="sgd", jit_compile=True)
        assert_close(inside, results[0], 1e-5)


@every_kind
def test_training_without_the_bridge_to_xla(kind, monkeypatch):
    """Tests that Keras declines XLA, as beside an older TensorFlow."""
    monkeypatch.setattr(_loader, "has_xla", lambda: False)
    call = own_call(kind)
    layer = new(kind)
    model = model_of(layer, call)
    assert not layer.supports_jit
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is False
    fit(model, call, outputs_of(kind))
    assert np.any(layer.offset_kernel)


# Among other layers.


@one_of_each
def test_keras_own_test_of_layers(kind, config):
    """Tests config, building, symbolic and eager calls, mixed types, training.

    Keras' test trains only layers of one argument. Regions are 0, 1 or 2.
    """
    shapes = {
        f"{k}_shape": (3, *v.shape[1:]) for k, v in own_call(kind).items()
    }
    dtypes = {k: "int32" if "rois" in k else "float32" for k in shapes}
    if kind == "conv2d":
        shapes, dtypes = shapes["inputs_shape"], "float32"
    testing.TestCase().run_layer_test(
        KINDS[kind].layer,
        {**KINDS[kind].config, **config},
        input_shape=shapes,
        input_dtype=dtypes,
        expected_output_shape=(3, *output_shape(kind)[1:]),
        expected_output_dtype="float32",
        expected_num_trainable_weights=2 if kind == "psroi" else 4,
        expected_num_non_trainable_weights=0,
        expected_num_losses=0,
        supports_masking=False,
        run_training_check=kind == "conv2d",
    )


@one_of_each
def test_variables_are_attributes_and_their_paths_say_so(kind, config):
    """Tests the names that a regular expression of an optimizer matches."""
    layer = new(kind, name="head", **config)
    model = model_of(layer, own_call(kind))
    names = {"offset_kernel", "offset_bias"}
    if kind == "conv2d":
        names |= {"kernel", "bias"}
    for name in names:
        assert getattr(layer, name).name == name
    if "units" in config:
        names |= {"offset_hidden_kernel_0", "offset_hidden_bias_0"}
    assert {v.path for v in model.trainable_variables} == {
        f"head/{name}" for name in names
    }


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize(("kind", "source"), SOURCES)
def test_a_keras_mask_never_becomes_anything(kind, source):
    """Tests that the mask becomes no modulation, modulator or region."""
    layer, call = built(kind, source)
    call["inputs"][:, 2:5, 3:] = 0.0
    masking = keras.layers.Masking()

    def masked(call):
        return {k: masking(v) if k != "rois" else v for k, v in call.items()}

    mask_of = keras.src.backend.get_keras_mask
    assert not np.all(mask_of(masked(call)["inputs"]))
    expected = layer(**call)
    output = layer(**masked(call))
    assert_equal(output, expected)
    assert mask_of(output) is None
    inputs = symbols(call)
    model = keras.Model(inputs, layer(**masked(inputs)))
    assert_equal(model(call), expected)


@every_kind
def test_activity_regularizer(kind):
    layer = displaced(kind, activity_regularizer=keras.regularizers.L1(0.5))
    output = layer(**own_call(kind))
    expected = keras.layers.ActivityRegularization(l1=0.5)
    expected(output)
    np.testing.assert_allclose(layer.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "unknown sizes", "nothing known"])
@pytest.mark.parametrize(("kind", "source", "config"), EVERY_CALL, ids=str)
def test_any_number_of_images_or_regions(kind, source, config, mode):
    layer, call = built(kind, source, **config)
    function, expected = in_mode(layer, call, mode), layer(**call)
    for count in (len(expected), 0, 1):
        some = {
            name: value
            if kind != "conv2d" and "inputs" in name
            else value[:count]
            for name, value in call.items()
        }
        # Sums may be in another order for another number.
        exact = source != "own" and count == len(expected)
        tolerance = 0 if exact else 1e-5
        assert_close(function(some), expected[:count], tolerance, case=count)


@one_of_each
def test_in_tf_function_and_tf_data(kind, config):
    layer, call = built(kind, "own", **config)
    expected = layer(**call)
    assert_close(in_mode(layer, call, "graph")(call), expected, 1e-5)
    data = tf.data.Dataset.from_tensors(call).map(lambda call: layer(**call))
    (output,) = data.as_numpy_iterator()
    assert_close(output, expected, 1e-5)


@pytest.mark.parametrize(
    "convert",
    [np.float64, np.float16, tf.constant, tf.Variable, keras.Variable]
    + [np.uint8],
    ids=["float64", "float16", "tensor", "variable", "keras", "uint8"],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@every_kind
def test_operands_of_every_kind(kind, data_format, convert):
    """Compares with float32 operands; only images may be of uint8."""
    layer, call = built(kind, "own", data_format=data_format)
    # Whole numbers of 16 bits, and regions that float16 can hold.
    call = {k: np.round(4 * v) / 4 for k, v in call.items()}
    names = call.keys()
    if convert is np.uint8:
        names = ["inputs"]
        call["inputs"] = np.round(10 * call["inputs"]).clip(0)
    expected = layer(**call)
    actual = layer(**{**call, **{k: convert(call[k]) for k in names}})
    assert_equal(actual, expected, dtype="float32")


@every_kind
def test_keywords_that_no_layer_has(kind):
    with pytest.raises((ValueError, TypeError), match="boundaries"):
        new(kind, boundaries="zeros")
