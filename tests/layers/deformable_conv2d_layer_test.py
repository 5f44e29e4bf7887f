# SPDX-License-Identifier: Apache-2.0
"""Tests of the Keras layer `tf_deform.layers.DeformableConv2D`.

A new layer's offset branch is zero, and then almost anything that is wrong
with offsets goes unseen. So the tests start with `displaced`, which gives the
branch random values that move samples by more than a pixel.
"""

import inspect
import json

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_deform.layers import DeformableConv2D
from tf_deform.ops import deformable_conv2d

MODULATIONS = [None, "sigmoid", "2sigmoid"]
TOLERANCE = {  # Four units of the last place for the 16-bit types.
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 4 * 2**-11,
    "bfloat16": 4 * 2**-8,
}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def displace(layer: DeformableConv2D, seed: int = 0) -> None:
    """Sets the branch: samples move by about (1.4, -2.3) +- 1 pixels."""
    rng = np.random.default_rng(seed)
    *fan_in, branch_channels = layer.offset_kernel.shape
    scale = 0.5 / np.sqrt(np.prod(fan_in))
    taps = layer.offset_groups * int(np.prod(layer.kernel_size))
    bias = rng.normal(0, 0.5, branch_channels)
    bias[: 2 * taps] += np.tile([1.4, -2.3], taps)  # (dy, dx), ...
    layer.offset_kernel.assign(rng.normal(0, scale, layer.offset_kernel.shape))
    layer.offset_bias.assign(bias)
    if layer.bias is not None:
        layer.bias.assign(rng.normal(size=layer.bias.shape))


def displaced(
    input_shape: tuple[int | None, ...] = (None, 8, 9, 6),
    filters: int = 4,
    kernel_size: int | tuple[int, int] = 3,
    **config: object,
) -> DeformableConv2D:
    """Returns a built layer whose offsets are far from zero."""
    layer = DeformableConv2D(filters, kernel_size, **config)
    layer.build(input_shape)
    displace(layer)
    return layer


def branch(layer: DeformableConv2D, x: np.ndarray) -> tuple:
    """Computes `(offset, mask)` of a layer from its weights, by `Conv2D`.

    Channels last; `mask` is None without modulation.
    """
    pads = layer.padding
    if not isinstance(pads, str):
        pads = reference.explicit_padding(pads, None, None, None, None)
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
        pads = "valid"
    dilation_rate = layer.offset_dilation_rate or layer.dilation_rate
    values = tf.nn.conv2d(
        x,
        layer.offset_kernel,
        strides=layer.strides,
        padding=pads.upper(),
        dilations=dilation_rate,
    )
    values = values + layer.offset_bias
    if layer.modulation is None:
        return values, None
    offset, mask = values[..., : -values.shape[-1] // 3], None
    mask = tf.sigmoid(values[..., -values.shape[-1] // 3 :])
    return offset, 2 * mask if layer.modulation == "2sigmoid" else mask


def by_the_op(layer: DeformableConv2D, x: np.ndarray) -> np.ndarray:
    """What a layer without activation should return, channels last."""
    offset, mask = branch(layer, x)
    output = deformable_conv2d(
        x,
        layer.kernel,
        offset,
        mask,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        offset_groups=layer.offset_groups,
        boundary=layer.boundary,
    )
    return output if layer.bias is None else output + layer.bias


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares shapes, and errors with the largest value expected."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def test_displace_moves_samples_by_more_than_a_pixel():
    """The helper that the other tests lean on."""
    layer = displaced(modulation="sigmoid", offset_groups=2)
    offset, mask = branch(layer, random(2, 8, 9, 6))
    dy, dx = offset[..., 0::2], offset[..., 1::2]
    assert 1 < np.mean(dy) < 2 and -3 < np.mean(dx) < -2
    assert np.std(dy) > 0.3 and np.std(dx) > 0.3
    assert np.std(mask) > 0.1


# A drop-in for Conv2D.


def test_signature_is_that_of_conv2d():
    ours = inspect.signature(DeformableConv2D).parameters
    theirs = inspect.signature(keras.layers.Conv2D).parameters
    theirs = {k: v for k, v in theirs.items() if k != "kwargs"}
    extra = {
        "offset_groups": 1,
        "modulation": None,
        "boundary": "zeros",
        "offset_dilation_rate": None,
        "implementation": "native",
    }
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    assert {
        k: v.default for k, v in ours.items() if k not in {*theirs, "kwargs"}
    } == extra


def test_call_has_no_argument_named_mask():
    """Keras fills arguments of that name from masks of its own."""
    call = inspect.signature(DeformableConv2D.call).parameters
    assert list(call) == ["self", "inputs", "offset", "modulator"]


CONV2D_CONFIGS = [
    {},
    {"padding": "same"},
    {"padding": "SAME"},
    {"strides": 2},
    {"strides": (3, 2), "padding": "same"},
    {"strides": 2, "padding": "same", "kernel_size": 2},
    {"dilation_rate": 2},
    {"dilation_rate": (1, 3), "padding": "same", "kernel_size": (2, 3)},
    {"groups": 3, "filters": 9},
    {"groups": 6, "filters": 6, "padding": "same"},
    {"activation": "relu", "padding": "same"},
    {"activation": "softmax"},
    {"use_bias": False},
    {"kernel_size": 1},
    {"kernel_size": [2, 4], "strides": [2, 1]},
]


@pytest.mark.parametrize("modulation", [None, "2sigmoid"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("config", CONV2D_CONFIGS, ids=str)
def test_a_new_layer_equals_conv2d(config, data_format, modulation):
    """Before it is trained the branch gives zero offsets: a plain one."""
    # With as many filters as columns in the output, Keras 3.15 adds the bias
    # of a channels_first Conv2D along the width; 11 keeps clear of it.
    config = {"filters": 11, "kernel_size": 3, **config}
    config["data_format"] = data_format
    x = random(2, 11, 10, 6)
    if data_format == "channels_first":
        x = np.transpose(x, (0, 3, 1, 2))
    plain = keras.layers.Conv2D(**config, bias_initializer="normal")
    expected = plain(x)
    layer = DeformableConv2D(**config, modulation=modulation)
    assert layer.compute_output_shape(x.shape) == expected.shape
    layer.build(x.shape)
    layer.kernel.assign(plain.kernel)
    if layer.use_bias:
        layer.bias.assign(plain.bias)
    else:
        assert layer.bias is None
    assert_close(layer(x), expected)


def test_sigmoid_halves_a_new_layer():
    x = random(2, 8, 9, 6)
    layer = DeformableConv2D(4, 3, modulation="sigmoid")
    half = layer(x)
    plain = keras.layers.Conv2D(4, 3)
    plain.build(x.shape)
    plain.kernel.assign(layer.kernel)
    assert_close(half, 0.5 * plain(x))


def test_data_format_defaults_to_the_keras_setting():
    keras.config.set_image_data_format("channels_first")
    try:
        assert DeformableConv2D(4, 3).data_format == "channels_first"
    finally:
        keras.config.set_image_data_format("channels_last")
    assert DeformableConv2D(4, 3).data_format == "channels_last"


# The offset branch.

CONFIGS = [
    {},
    {"padding": "same"},
    {"strides": 2, "padding": "same"},
    {"strides": (2, 3), "dilation_rate": (2, 1), "padding": "same"},
    {"strides": 2, "dilation_rate": 2},
    {"padding": 1},
    {"padding": (2, 1)},
    {"padding": ((0, 1), (3, 2)), "strides": (1, 2)},
    {"groups": 2, "offset_groups": 3},
    {"groups": 3, "offset_groups": 2, "filters": 6, "kernel_size": (2, 3)},
    {"boundary": "clamp", "padding": "same"},
    {"use_bias": False},
    {"filters": 7},  # As many as the output has columns.
]


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_own_branch_is_one_convolution(config, modulation):
    x = random(2, 8, 9, 6)
    layer = displaced(**config, modulation=modulation)
    assert_close(layer(x), by_the_op(layer, x))


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_channels_first_is_a_transpose(config, modulation):
    x = random(2, 8, 9, 6)
    last = displaced(**config, modulation=modulation)
    first = displaced(
        (None, 6, 8, 9),
        **config,
        modulation=modulation,
        data_format="channels_first",
    )
    first.kernel.assign(last.kernel)
    actual = first(np.transpose(x, (0, 3, 1, 2)))
    assert_close(np.transpose(actual, (0, 2, 3, 1)), last(x))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_offset_dilation_rate(modulation):
    """A dilated convolution whose branch is not dilated."""
    x = random(2, 8, 9, 6)
    layer = displaced(
        padding="same",
        dilation_rate=2,
        offset_dilation_rate=1,
        modulation=modulation,
    )
    assert_close(layer(x), by_the_op(layer, x))
    layer = displaced(padding="same", dilation_rate=2, modulation=modulation)
    assert_close(layer(x), by_the_op(layer, x))


@pytest.mark.parametrize(
    ("padding", "branch_padding"),
    [
        (2, ((1, 1), (1, 1))),
        (((1, 2), (3, 4)), ((0, 1), (2, 3))),
        ("valid", ((-1, -1), (-1, -1))),  # Cuts the border off.
        ((1, 0), ((0, 0), (-1, -1))),
    ],
)
def test_taps_of_branch_and_layer_have_one_centre(padding, branch_padding):
    """A 3x3 branch of rate 1 sits in the middle of a 3x3 layer of rate 2."""
    x = random(2, 8, 9, 6)
    layer = displaced(
        padding=padding, dilation_rate=2, offset_dilation_rate=1, strides=2
    )
    padded = x
    for axis, (before, after) in enumerate(branch_padding, start=1):
        size = x.shape[axis]
        middle = np.arange(max(-before, 0), size - max(-after, 0))
        padded = np.take(padded, middle, axis)
        widths = [(0, 0)] * 4
        widths[axis] = max(before, 0), max(after, 0)
        padded = np.pad(padded, widths)
    offset = tf.nn.conv2d(padded, layer.offset_kernel, 2, "VALID")
    expected = deformable_conv2d(
        x,
        layer.kernel,
        offset + layer.offset_bias,
        strides=2,
        padding=padding,
        dilation_rate=2,
    )
    assert_close(layer(x), expected + layer.bias)


def test_shapes_of_the_branch():
    """Offsets, then the mask as the last third; not grouped, with a bias."""
    config = {"kernel_size": (2, 3), "groups": 3, "filters": 9}
    layer = displaced(**config, offset_groups=2)
    assert layer.kernel.shape == (2, 3, 2, 9)
    assert layer.offset_kernel.shape == (2, 3, 6, 2 * 2 * 3 * 2)
    assert layer.offset_bias.shape == (2 * 2 * 3 * 2,)
    layer = displaced(**config, offset_groups=2, modulation="sigmoid")
    assert layer.offset_kernel.shape == (2, 3, 6, 2 * 2 * 3 * 3)
    assert layer.offset_bias.shape == (2 * 2 * 3 * 3,)
    # `use_bias` is about the output.
    layer = displaced(**config, use_bias=False)
    assert layer.bias is None
    assert layer.offset_bias is not None


def test_branch_starts_at_zero_whatever_the_initializers():
    layer = DeformableConv2D(
        4,
        3,
        modulation="sigmoid",
        kernel_initializer="ones",
        bias_initializer="ones",
    )
    layer.build((None, 8, 9, 6))
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)
    assert np.all(layer.kernel) and np.all(layer.bias)


@pytest.mark.parametrize("modulation", [None, "sigmoid"])
def test_count_params(modulation):
    branch_channels = 3 * 3 * (2 if modulation is None else 3)
    layer = displaced(modulation=modulation)
    assert layer.count_params() == (
        (3 * 3 * 6 * 4 + 4) + (3 * 3 * 6 * branch_channels + branch_channels)
    )


def test_variables_are_attributes_and_their_paths_say_so():
    """What a regular expression of an optimizer looks for."""
    model = keras.Sequential(
        [
            keras.Input((8, 9, 6)),
            DeformableConv2D(4, 3, modulation="sigmoid", name="deform"),
        ]
    )
    layer = model.layers[0]
    names = ["kernel", "bias", "offset_kernel", "offset_bias"]
    for name in names:
        variable = getattr(layer, name)
        assert variable.name == name
        assert variable.path.endswith(f"deform/{name}")
    assert {v.name for v in model.trainable_variables} == set(names)


# Displacements given by the caller.


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("has_modulator", [True, False])
def test_given_offset(modulation, data_format, has_modulator):
    """The branch is not built; `modulator` is used as it is, or is 1."""
    x, offset = random(2, 8, 9, 6), 2 * random(2, 6, 7, 36, seed=1)
    modulator = random(2, 6, 7, 18, seed=2) if has_modulator else None
    layer = DeformableConv2D(
        4,
        3,
        offset_groups=2,
        modulation=modulation,
        data_format=data_format,
        bias_initializer="normal",
    )

    def to_layer(array):
        if array is None or data_format == "channels_last":
            return array
        return np.transpose(array, (0, 3, 1, 2))

    output = layer(to_layer(x), to_layer(offset), to_layer(modulator))
    if data_format == "channels_first":
        output = np.transpose(output, (0, 2, 3, 1))
    assert [v.name for v in layer.weights] == ["kernel", "bias"]
    expected = deformable_conv2d(
        x, layer.kernel, offset, modulator, offset_groups=2
    )
    assert_close(output, expected + layer.bias)


def test_given_offset_the_branch_does_not_run():
    """A branch full of NaN has no say."""
    x, offset = random(2, 8, 9, 6), 2 * random(2, 6, 7, 18, seed=1)
    layer = displaced(modulation="sigmoid")
    before = layer(x, offset)
    layer.offset_kernel.assign(np.full(layer.offset_kernel.shape, np.nan))
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, np.nan))
    np.testing.assert_array_equal(layer(x, offset), before)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, offset))
    gradients = tape.gradient(loss, [layer.offset_kernel, layer.offset_bias])
    assert gradients == [None, None]


def test_given_offset_in_a_functional_model():
    """One branch for two layers, as a model may share it."""
    x = random(2, 8, 9, 6)
    inputs = keras.Input((None, None, 6))
    shared = keras.layers.Conv2D(27, 3, padding="same", name="shared")(inputs)
    offset = shared[..., :18]
    modulator = keras.ops.sigmoid(shared[..., 18:])
    layers = [DeformableConv2D(n, 3, padding="same") for n in (4, 5)]
    outputs = [f(inputs, offset=offset, modulator=modulator) for f in layers]
    model = keras.Model(inputs, outputs)
    assert len(model.weights) == 2 + 2 + 2
    values = model.get_layer("shared")(x)
    for output, layer in zip(model.predict(x, verbose=0), layers, strict=True):
        expected = deformable_conv2d(
            x,
            layer.kernel,
            values[..., :18],
            tf.sigmoid(values[..., 18:]),
            padding="same",
        )
        assert_close(output, expected)


def test_gradients_reach_given_displacements():
    x = tf.constant(random(2, 8, 9, 6))
    offset = tf.constant(2 * random(2, 6, 7, 18, seed=1))
    modulator = tf.constant(random(2, 6, 7, 9, seed=2))
    layer = DeformableConv2D(4, 3)
    operands = [x, offset, modulator]
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output = layer(x, offset, modulator)
    gradients = tape.gradient(output, operands)
    expected = reference.deformable_conv2d_grad(
        x, layer.kernel, offset, modulator, np.ones(output.shape)
    )
    assert_close(gradients[0], expected.inputs, 3e-4)
    assert_close(gradients[1], expected.offset, 3e-4)
    assert_close(gradients[2], expected.mask, 3e-4)


# Shapes.


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("sizes", "config", "expected"),
    [
        ((2, 8, 9), {}, (2, 6, 7)),
        ((None, 8, 9), {}, (None, 6, 7)),
        ((None, None, 9), {"padding": "same"}, (None, None, 9)),
        ((None, None, None), {"strides": 2}, (None, None, None)),
        ((2, 8, 9), {"strides": 2, "padding": "same"}, (2, 4, 5)),
        ((2, 8, 9), {"strides": 2, "dilation_rate": 2}, (2, 2, 3)),
        ((2, 8, 9), {"padding": 1}, (2, 8, 9)),
        ((2, 8, None), {"padding": (2, 1)}, (2, 10, None)),
        ((2, 8, 9), {"padding": ((0, 1), (3, 2))}, (2, 7, 12)),
    ],
)
def test_compute_output_shape(sizes, config, expected, data_format):
    layer = DeformableConv2D(4, 3, data_format=data_format, **config)

    def shape(sizes, channels):
        if data_format == "channels_last":
            return (*sizes, channels)
        return (sizes[0], channels, *sizes[1:])

    input_shape, expected = shape(sizes, 6), shape(expected, 4)
    assert tuple(layer.compute_output_shape(input_shape)) == expected
    assert layer(keras.KerasTensor(input_shape)).shape == expected
    if None not in input_shape:
        assert layer(np.zeros(input_shape)).shape == expected


@pytest.mark.parametrize("padding", ["valid", "same", ((0, 1), (3, 2))])
def test_model_of_unknown_sizes(padding):
    """One functional model serves every image, in every batch."""
    inputs = keras.Input((None, None, 6))
    layer = DeformableConv2D(4, 3, padding=padding, modulation="sigmoid")
    model = keras.Model(inputs, layer(inputs))
    displace(layer)
    assert model.output_shape == (None, None, None, 4)
    for shape in [(2, 8, 9, 6), (5, 11, 6, 6), (1, 3, 3, 6)]:
        x = random(*shape)
        assert_close(model.predict(x, verbose=0), by_the_op(layer, x))


def test_empty_batch():
    layer = displaced(modulation="2sigmoid")
    assert layer(np.zeros((0, 8, 9, 6))).shape == (0, 6, 7, 4)


# Configuration, saving, loading.

EVERYTHING = {
    "filters": 6,
    "kernel_size": (3, 2),
    "strides": (2, 1),
    "padding": ((1, 0), (2, 1)),
    "data_format": "channels_last",
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
    "offset_dilation_rate": (1, 2),
    "name": "everything",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


def test_config_holds_every_argument():
    layer = DeformableConv2D(**EVERYTHING)
    config = layer.get_config()
    assert EVERYTHING.keys() <= config.keys()
    clone = DeformableConv2D.from_config(config)
    assert clone.get_config() == config
    assert clone.kernel_initializer.get_config() == (
        EVERYTHING["kernel_initializer"].get_config()
    )
    assert clone.kernel_regularizer.l2 == 0.25
    assert isinstance(clone.bias_regularizer, keras.regularizers.L1)
    assert clone.activity_regularizer.l1 == 0.5
    assert clone.kernel_constraint.max_value == 3.0
    assert isinstance(clone.bias_constraint, keras.constraints.NonNeg)
    assert clone.activation is keras.activations.tanh
    assert clone.compute_dtype == "bfloat16"
    assert not clone.trainable


@pytest.mark.parametrize(
    "padding",
    ["valid", "same", "SAME", 0, 2, (2, 1), ((0, 1), (3, 2)), [[0, 1], [3, 2]]],
    ids=str,
)
def test_every_padding_survives_json(padding):
    layer = displaced(padding=padding)
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    copy = keras.saving.deserialize_keras_object(stored)
    assert isinstance(copy, DeformableConv2D)
    assert copy.padding == layer.padding
    x = random(2, 8, 9, 6)
    copy(x)  # Builds it.
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(copy(x), layer(x))


def _small_model() -> keras.Model:
    """A functional model with both kinds of layer: own branch, and given."""
    inputs = keras.Input((None, None, 6))
    own = DeformableConv2D(
        6, 3, padding=1, modulation="sigmoid", groups=2, activation="tanh"
    )
    given = DeformableConv2D(3, 1, offset_groups=2, boundary="clamp")
    offset = keras.layers.Conv2D(4, 3, padding="same", name="shared")(inputs)
    model = keras.Model(inputs, given(own(inputs), offset=1.5 + offset))
    displace(own)
    return model


_LOAD_KERAS = """
import sys
import numpy as np
import keras
import tf_deform

model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""

_LOAD_SAVED_MODEL = """
import sys
import numpy as np
import tensorflow as tf
import tf_deform

model = tf.saved_model.load(sys.argv[1])
np.save(sys.argv[3], model.serve(np.load(sys.argv[2])))
"""


@pytest.mark.parametrize("form", ["keras", "saved_model"])
def test_a_fresh_process_loads_the_model(form, tmp_path, run_python):
    """With `import tf_deform` and nothing else."""
    model, x = _small_model(), random(2, 8, 9, 6)
    expected = model.predict(x, verbose=0)
    np.save(tmp_path / "x.npy", x)
    if form == "keras":
        path, script = tmp_path / "model.keras", _LOAD_KERAS
        model.save(path)
    else:
        path, script = tmp_path / "model", _LOAD_SAVED_MODEL
        model.export(path, verbose=False)
    run_python(script, path, tmp_path / "x.npy", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


def test_save_and_load_weights(tmp_path):
    x = random(2, 8, 9, 6)
    model = _small_model()
    model.save_weights(tmp_path / "model.weights.h5")
    other = _small_model()
    for variable in other.weights:
        variable.assign(np.full(variable.shape, 0.25))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        other.predict(x, verbose=0), model.predict(x, verbose=0)
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_takes_the_weights_of_conv2d(use_bias):
    conv = keras.layers.Conv2D(4, 3, use_bias=use_bias)
    layer = DeformableConv2D(4, 3, use_bias=use_bias, modulation="sigmoid")
    for each in (conv, layer):
        each.build((None, 8, 9, 6))
    displace(layer)
    branch = layer.offset_kernel.numpy(), layer.offset_bias.numpy()
    layer.set_weights(conv.get_weights())
    np.testing.assert_array_equal(layer.kernel, conv.kernel)
    np.testing.assert_array_equal(layer.offset_kernel, branch[0])
    np.testing.assert_array_equal(layer.offset_bias, branch[1])
    with pytest.raises(ValueError):
        layer.set_weights(conv.get_weights()[:1] * 3)


@pytest.mark.parametrize("has_branch", [True, False])
def test_weights_with_and_without_a_branch_are_not_mixed_up(
    has_branch, tmp_path
):
    def model(own_branch):
        inputs = keras.Input((8, 9, 6))
        offset = keras.Input((6, 7, 18))
        layer = DeformableConv2D(4, 3)
        outputs = layer(inputs) if own_branch else layer(inputs, offset)
        return keras.Model([inputs, offset], outputs)

    model(has_branch).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="Expected weights .* branch"):
        model(not has_branch).load_weights(tmp_path / "model.weights.h5")


def test_clone_model():
    x, model = random(2, 8, 9, 6), _small_model()
    clone = keras.models.clone_model(model)
    assert [v.shape for v in clone.weights] == [v.shape for v in model.weights]
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(
        clone.predict(x, verbose=0), model.predict(x, verbose=0)
    )


# Dtype policies.


@pytest.mark.parametrize("place", ["alone", "mixed model", "float32 model"])
@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize("modulation", [None, "sigmoid"])
@pytest.mark.parametrize(
    "policy", ["float32", "float64", "mixed_float16", "mixed_bfloat16"]
)
def test_dtype_policies(policy, modulation, x_dtype, place):
    """Keras casts differently in each place; the layer's result is one."""
    if place == "mixed model":
        keras.config.set_dtype_policy(policy)
        layer = DeformableConv2D(4, 3, modulation=modulation)
    else:
        layer = DeformableConv2D(4, 3, modulation=modulation, dtype=policy)
    layer.build((None, 8, 9, 6))
    displace(layer)
    compute = tf.as_dtype(layer.compute_dtype)
    x = random(2, 8, 9, 6).astype(x_dtype)

    if place == "alone":
        actual = layer(x)
    else:
        inputs = keras.Input((8, 9, 6))
        actual = keras.Model(inputs, layer(inputs))(x)

    variable_dtype = "float64" if policy == "float64" else "float32"
    assert {v.dtype for v in layer.weights} == {variable_dtype}
    assert actual.dtype == compute
    # The same branch in the compute dtype, then exact arithmetic.
    x, kernel, bias, offset_kernel, offset_bias = (
        tf.cast(v, compute)
        for v in (
            x,
            layer.kernel.value,
            layer.bias.value,
            layer.offset_kernel.value,
            layer.offset_bias.value,
        )
    )
    values = tf.nn.conv2d(x, offset_kernel, 1, "VALID") + offset_bias
    values = tf.cast(values, variable_dtype).numpy()
    mask = None
    if modulation:
        mask = 1 / (1 + np.exp(-values[..., 18:]))
    expected = reference.deformable_conv2d(
        x, kernel, values[..., :18], mask
    ) + np.asarray(bias, np.float64)
    assert_close(actual, expected, TOLERANCE[compute.name])


@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", ["alone", "mixed model", "float32 model"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_given_displacements_remain_float32(policy, place, x_dtype):
    """Neither an offset of 1000.3 nor a factor of 2**17 fits in float16."""
    if place == "mixed model":
        keras.config.set_dtype_policy(policy)
        layer = DeformableConv2D(1, 1, kernel_initializer="ones")
    else:
        layer = DeformableConv2D(1, 1, kernel_initializer="ones", dtype=policy)
    compute = layer.compute_dtype
    x = np.zeros((1, 2, 1100, 1), x_dtype)
    x[0, :, 1001] = 2**-10
    offset = np.zeros((1, 2, 1100, 2), x_dtype)
    offset[0, 0, 0] = 0.0, 1000.3
    modulator = np.ones((1, 2, 1100, 1), x_dtype)
    modulator[0, 0, 0] = 2**17

    if place == "alone":
        output = layer(x, offset, modulator)
    else:
        arrays = [x, offset, modulator]
        inputs = [keras.Input(a.shape[1:], dtype="float32") for a in arrays]
        output = keras.Model(inputs, layer(*inputs))(arrays)
    assert output.dtype == compute
    np.testing.assert_allclose(
        np.float64(output[0, 0, 0, 0]), 0.3 * 2**7, rtol=TOLERANCE[compute]
    )


def test_float64_displacements_stay_float64():
    x = np.zeros((1, 1, 200, 1))
    x[0, 0, 101] = 1e6
    offset = np.zeros((1, 1, 200, 2))
    offset[0, 0, 0, 1] = 100 + 1e-6
    layer = DeformableConv2D(1, 1, kernel_initializer="ones", dtype="float64")
    np.testing.assert_allclose(layer(x, offset)[0, 0, 0, 0], 1.0, rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_training_updates_float32_weights(policy):
    keras.config.set_dtype_policy(policy)
    layer = DeformableConv2D(4, 3, modulation="sigmoid")
    model = keras.Sequential([keras.Input((8, 9, 6)), layer])
    displace(layer)
    before = layer.get_weights()
    model.compile("adam", "mse")
    model.fit(random(8, 8, 9, 6), random(8, 6, 7, 4), verbose=0)
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert new.dtype == np.float32
        assert np.all(np.isfinite(new)) and np.any(new != old)


# Training.


def test_gradients_equal_those_of_the_op():
    """For all four weights and the inputs, through branch and modulation."""
    x = tf.constant(random(2, 8, 9, 6))
    layer = displaced(modulation="2sigmoid", groups=2, offset_groups=3)
    operands = [x, *(v.value for v in layer.weights)]
    assert len(operands) == 5
    results = []
    for function in (layer, lambda x: by_the_op(layer, x)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 2)
        results.append(tape.gradient(loss, operands))
    for actual, expected in zip(*results, strict=True):
        assert np.any(expected)
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_fit_decreases_the_loss_and_moves_every_weight(modulation):
    x = random(32, 8, 9, 6)
    teacher = displaced(modulation=modulation)
    teacher.kernel.assign(random(*teacher.kernel.shape, seed=3))
    y = teacher(x).numpy()
    layer = DeformableConv2D(4, 3, modulation=modulation)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    displace(layer, seed=1)
    before = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    loss = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.95 * loss
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert np.any(old != new)


def test_a_frozen_layer_stays_as_it_is():
    layer = DeformableConv2D(4, 3, modulation="sigmoid", trainable=False)
    head = keras.layers.Conv2D(1, 1)
    model = keras.Sequential([keras.Input((8, 9, 6)), layer, head])
    displace(layer)
    assert layer.trainable_weights == []
    assert len(layer.non_trainable_weights) == 4
    before = layer.get_weights()
    model.compile("sgd", "mse")
    model.fit(random(8, 8, 9, 6), random(8, 6, 7, 1), verbose=0)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_regularizers_leave_the_branch_alone():
    layer = displaced(kernel_regularizer="l2", bias_regularizer="l1")
    kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
    losses = sorted(float(loss) for loss in layer.losses)
    expected = [0.01 * np.sum(kernel**2), 0.01 * np.sum(np.abs(bias))]
    np.testing.assert_allclose(losses, sorted(expected), rtol=1e-5)
    layer = displaced(kernel_regularizer="l2")
    assert len(layer.losses) == 1


def test_constraints_leave_the_branch_alone():
    layer = DeformableConv2D(
        4,
        3,
        modulation="sigmoid",
        kernel_constraint="non_neg",
        bias_constraint="non_neg",
    )
    model = keras.Sequential([keras.Input((8, 9, 6)), layer])
    displace(layer)
    model.compile("sgd", "mse")
    model.fit(random(8, 8, 9, 6), random(8, 6, 7, 4), verbose=0)
    assert np.all(layer.kernel >= 0) and np.all(layer.bias >= 0)
    assert np.any(layer.offset_kernel < 0) and np.any(layer.offset_bias < 0)


def test_activity_regularizer():
    layer = displaced(activity_regularizer=keras.regularizers.L1(0.5))
    x = random(2, 8, 9, 6)
    output = layer(x)
    expected = keras.layers.ActivityRegularization(l1=0.5)
    expected(output)
    np.testing.assert_allclose(layer.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("how", ["constructor", "enable_lora"])
def test_lora(how):
    """What Conv2D does for fine-tuning: a low-rank update of the kernel."""
    x = random(2, 8, 9, 6)
    config = {"lora_rank": 2} if how == "constructor" else {}
    layer = displaced(modulation="sigmoid", **config)
    if how == "enable_lora":
        layer.enable_lora(2)
    before = layer(x)
    layer.lora_kernel_b.assign(random(*layer.lora_kernel_b.shape))
    after = layer(x)
    assert np.abs(after - before).max() > 0.1
    assert_close(after, by_the_op(layer, x))
    assert {v.name for v in layer.trainable_weights} == {
        "bias",
        "offset_kernel",
        "offset_bias",
        "lora_kernel_a",
        "lora_kernel_b",
    }


def test_jit_compile_does_not_crash():
    """Asked for XLA, a model trains and predicts as it does without."""
    results = []
    for jit_compile in (True, False):
        layer = DeformableConv2D(4, 3, modulation="sigmoid")
        model = keras.Sequential([keras.Input((8, 9, 6)), layer])
        layer.kernel.assign(random(*layer.kernel.shape))
        displace(layer)
        model.compile("sgd", "mse", jit_compile=jit_compile)
        model.fit(
            random(8, 8, 9, 6), random(8, 6, 7, 4), shuffle=False, verbose=0
        )
        results.append(model.predict(random(3, 8, 9, 6), verbose=0))
    assert_close(*results)


# Among other layers.


def test_a_keras_mask_never_becomes_modulation():
    x = random(2, 8, 9, 6)
    x[:, 2:5, 3:] = 0.0
    layer = displaced(modulation="sigmoid")
    expected = layer(x)
    masked = keras.layers.Masking()(x)
    assert not np.all(keras.src.backend.get_keras_mask(masked))
    np.testing.assert_array_equal(layer(masked), expected)
    inputs = keras.Input((8, 9, 6))
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    np.testing.assert_allclose(model(x), expected, rtol=1e-6)


def test_a_keras_mask_never_becomes_a_given_modulator():
    x, offset = random(2, 8, 9, 6), 2 * random(2, 6, 7, 18, seed=1)
    x[:, 2:5, 3:] = 0.0
    layer = DeformableConv2D(4, 3)
    expected = layer(x, offset)
    masked_x = keras.layers.Masking()(x)
    masked_offset = keras.layers.Masking()(offset)
    np.testing.assert_array_equal(layer(masked_x, masked_offset), expected)


def test_time_distributed():
    x = random(2, 3, 8, 9, 6)
    layer = displaced(modulation="sigmoid")
    inputs = keras.Input((None, 8, 9, 6))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    expected = np.stack([layer(frame) for frame in np.moveaxis(x, 1, 0)], 1)
    assert_close(model.predict(x, verbose=0), expected)


def test_nested_sequential():
    x = random(2, 12, 11, 6)
    layers = [
        displaced(filters=5, modulation="sigmoid"),
        displaced((None, 6, 7, 5), strides=2, padding="same"),
    ]
    block = keras.Sequential(layers, name="block")
    model = keras.Sequential([keras.Input((None, None, 6)), block])
    expected = by_the_op(layers[1], by_the_op(layers[0], x))
    assert_close(model.predict(x, verbose=0), expected)
    assert len(model.trainable_weights) == 8


def test_in_tf_function_and_tf_data():
    x = random(6, 8, 9, 6)
    layer = displaced(modulation="2sigmoid")
    expected = layer(x)
    assert_close(tf.function(layer)(x), expected)
    data = tf.data.Dataset.from_tensor_slices(x).batch(4).map(layer)
    assert_close(np.concatenate(list(data.as_numpy_iterator())), expected)
