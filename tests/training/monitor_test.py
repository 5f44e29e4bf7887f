# SPDX-License-Identifier: Apache-2.0
"""Tests what SamplingMonitor measures, says, and leaves alone."""

import csv
import importlib.util
import warnings

import numpy as np
import pytest
import tensorflow as tf
from surgery_models import (
    MAKERS,
    SIZE,
    displace,
    filled,
    images,
    make_functional,
)

import tf_deform
from tf_deform._keras import KERAS_2, keras
from tf_deform.training import SamplingMonitor, _monitor

layers = keras.layers
KEYS = ("offset_mean", "offset_p99", "outside", "modulator")
# The path of the layer of `small`, as far as all Kerases agree.
NAME = "deformed"


def monitored(model, inputs, **options) -> dict[str, float]:
    """Returns the logs of one epoch, without training."""
    monitor = SamplingMonitor(inputs, **options)
    monitor.set_model(model)
    monitor.on_train_begin()
    logs = {}
    monitor.on_epoch_end(0, logs)
    return logs


def short(logs):
    """Returns logs without the path, which has the model's name or not."""
    return {
        key.split("/")[0] if key.endswith(NAME) else key: value
        for key, value in logs.items()
    }


def quietly(function, *args, **options):
    """Calls a function, of which any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


def share_outside(layer, inputs, offset) -> float:
    """Asks the op which samples read nothing of a white image."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    ones = np.ones((*inputs.shape[:3], layer.offset_groups), np.float32)
    # Every filter reads one tap of one group.
    kernel = np.eye(layer.offset_groups * taps, dtype=np.float32).reshape(
        layer.offset_groups, *layer.kernel_size, -1
    )
    outputs = tf_deform.ops.deformable_conv2d(
        ones, kernel.transpose(1, 2, 0, 3), offset, **layer._arguments
    )
    assert outputs.shape[-1] == layer.offset_groups * taps
    return np.mean(outputs.numpy() == 0)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding": "same", "strides": (2, 3), "boundary": "clamp"},
        {"padding": "valid", "dilation_rate": (2, 1), "modulation": "sigmoid"},
        {
            "padding": ((2, 0), (3, 1)),
            "kernel_size": (2, 3),
            "offset_groups": 2,
            "modulation": "2sigmoid",
        },
        {"padding": "same", "kernel_size": (1, 4), "dilation_rate": 2},
    ],
)
def test_numbers(options):
    options = {"kernel_size": 3, **options}
    rng = np.random.default_rng(0)
    layer = tf_deform.layers.DeformableConv2D(4, **options)
    inputs = rng.normal(size=(2, 9, 11, 4)).astype(np.float32)
    image = keras.Input(inputs.shape[1:])
    model = keras.Model(image, layer(image))
    # Samples at integers are at, not near, the edge of an image.
    logs = monitored(model, inputs)
    plain = tf.zeros_like(layer._run_branch(tf.constant(inputs)))
    n = 2 * layer.offset_groups * np.prod(layer.kernel_size)
    (outside,) = (logs[key] for key in logs if key.startswith("outside/"))
    assert outside == share_outside(layer, inputs, plain[..., :n])
    displace(model, 0.5)
    logs = monitored(model, inputs)
    fields = layer._run_branch(tf.constant(inputs)).numpy()
    offset = fields[..., :n]
    length = np.linalg.norm(offset.reshape(-1, 2), axis=1)
    expected = {
        "offset_mean": length.mean(),
        "offset_p99": np.percentile(length, 99),
        "outside": share_outside(layer, inputs, offset),
    }
    assert 0.05 < expected["outside"] < 0.95
    if layer.modulation:
        scale = {"sigmoid": 1, "2sigmoid": 2}[layer.modulation]
        factor = scale / (1 + np.exp(-fields[..., n:].astype(float)))
        expected["modulator"] = factor.mean()
    got = {key.split("/")[0]: value for key, value in logs.items()}
    assert got == pytest.approx(expected, rel=1e-5)


def test_channels_first_and_16_bits_give_the_same_numbers():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 9, 11, 4)).astype(np.float32)

    def numbers(data_format, dtype):
        keras.utils.set_random_seed(0)
        layer = tf_deform.layers.DeformableConv2D(
            4, 3, data_format=data_format, modulation="sigmoid", dtype=dtype,
            name="layer",
        )  # fmt: skip
        given = inputs
        if data_format == "channels_first":
            given = inputs.transpose(0, 3, 1, 2)
        image = keras.Input(given.shape[1:])
        model = keras.Model(image, layer(image))
        displace(model, 0.5)
        return monitored(model, given)

    expected = numbers("channels_last", "float32")
    assert len(expected) == 4
    for tolerance, *kind in (
        (1e-6, "channels_first", "float32"),
        (0.01, "channels_last", "mixed_float16"),
        (0.01, "channels_first", "mixed_bfloat16"),
    ):
        assert numbers(*kind) == pytest.approx(expected, rel=tolerance), kind


@pytest.mark.parametrize("make", MAKERS)
def test_models(make):
    """Tests models in models, subclassed ones, and lists of layers."""
    model = filled(make)
    report = tf_deform.make_deformable(model, verbose=False)
    displace(model)
    logs = monitored(model, images())
    found = {key.partition("/")[2] for key in logs}
    assert len(found) == len(report.changed) > 1
    assert logs.keys() == {f"{key}/{name}" for key in KEYS for name in found}
    assert all(0 < value < 100 for value in logs.values()), logs


def test_a_layer_that_is_called_twice_counts_twice():
    layer = tf_deform.layers.DeformableConv2D(2, 3, padding="same", name="d")
    both = [keras.Input((6, 6, 2)), keras.Input((9, 5, 2))]
    model = keras.Model(both, [layer(each) for each in both])
    displace(model, 0.2)
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(2, *x.shape[1:])).astype("f") for x in both]
    parts = [np.ravel(layer._run_branch(tf.constant(x)).numpy()) for x in data]
    length = np.linalg.norm(np.concatenate(parts).reshape(-1, 2), axis=1)
    logs = monitored(model, data)
    assert logs["offset_mean/d"] == pytest.approx(length.mean(), rel=1e-5)


def small(jit=False, **options) -> keras.Model:
    """Makes a model with all that has a state, and losses of its own."""
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.GaussianNoise(0.1, seed=3),
            tf_deform.layers.DeformableConv2D(
                4, 3, activity_regularizer="l2", name="deformed",
                **{"modulation": "2sigmoid", **options},
            ),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=4),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ]
    )  # fmt: skip
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit)
    return model


def data(count=16):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, 8, 8, 2)).astype(np.float32)
    return x, x.mean((1, 2))[:, :1]


def fit(model, *callbacks, epochs=2):
    return model.fit(
        *data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0,
        callbacks=list(callbacks),
    ).history  # fmt: skip


@pytest.mark.parametrize("jit", [False, True], ids=["", "xla"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_training_is_the_same(policy, jit):
    if jit and not tf_deform._loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    if jit and KERAS_2:
        pytest.skip("Keras 2's noise is another in every run with XLA")
    keras.mixed_precision.set_global_policy(policy)
    plain, watched = small(jit), small(jit)
    expected = fit(plain)
    got = short(quietly(fit, watched, SamplingMonitor(data(4)[0])))
    for key in KEYS:
        assert len(got.pop(key)) == 2
    assert got == expected
    for one, two in zip(plain.variables, watched.variables):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


class Restless(layers.Layer):
    """Changes a weight in every call, and draws where no other layer does."""

    def build(self, shape):
        self.calls = self.add_weight(
            name="calls", shape=(), initializer="zeros", trainable=False
        )
        if not KERAS_2:
            self.seed = keras.random.SeedGenerator(0)
        self.built = True

    def call(self, x):
        self.calls.assign_add(1.0)
        if not KERAS_2:
            x += keras.random.normal(tf.shape(x), seed=self.seed)
        return x

    def compute_output_shape(self, shape):
        return shape


def test_state_is_given_back():
    image = keras.Input((6, 6, 2))
    x = Restless(activity_regularizer="l2")(image)
    model = keras.Model(image, tf_deform.layers.DeformableConv2D(2, 3)(x))
    before = [v.numpy() for v in model.variables]
    monitored(model, np.ones((1, 6, 6, 2), np.float32))
    for old, variable in zip(before, model.variables):
        np.testing.assert_array_equal(variable.numpy(), old)
    # Keras 2 keeps those that are symbols.
    assert not any(hasattr(loss, "numpy") for loss in model.losses)
    assert not tf.config.functions_run_eagerly()


@tf.keras.utils.register_keras_serializable("monitor_test")
class Compiled(layers.Layer):
    """Calls a layer in a function that TensorFlow compiles and keeps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = tf_deform.layers.DeformableConv2D(2, 3, name="inner")
        self.run = tf.function(self.inner, jit_compile=True)

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return self.run(x)

    def compute_output_shape(self, shape):
        return self.inner.compute_output_shape(shape)


def test_the_model_runs_as_in_inference():
    model = small()
    displace(model)
    x = data(4)[0]
    fields = model.get_layer("deformed")._run_branch(tf.constant(x)).numpy()
    length = np.linalg.norm(fields[..., :18].reshape(-1, 2), axis=1)
    logs = short(monitored(model, x))
    assert logs["offset_mean"] == pytest.approx(length.mean(), rel=1e-5)


def test_layers_in_compiled_functions():
    if not tf_deform._loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    image = keras.Input((6, 6, 2))
    model = keras.Model(image, Compiled()(image))
    x = np.ones((1, 6, 6, 2), np.float32)
    model(x)
    displace(model)
    logs = monitored(model, x)
    assert len(logs) == 3
    assert all("inner" in key for key in logs)


def test_logs_reach_other_callbacks(tmp_path):
    model = small(padding="same")
    path = tmp_path / "log.csv"
    others = [keras.callbacks.CSVLogger(str(path))]
    has_board = importlib.util.find_spec("tensorboard") is not None
    if has_board:
        others.append(keras.callbacks.TensorBoard(str(tmp_path / "keras")))
    monitor = SamplingMonitor(data(4)[0], log_dir=tmp_path / "own")
    history = fit(model, monitor, *others)
    rows = list(csv.DictReader(path.open()))
    own = scalars(tmp_path / "own")
    names = [name for name in history if name.endswith(NAME)]
    assert len(names) == len(KEYS) == len(own)
    assert monitor.history == {name: history[name] for name in names}
    for name in names:
        assert len(set(history[name])) == 2
        assert [float(row[name]) for row in rows] == history[name]
        assert own[name] == pytest.approx(dict(enumerate(history[name])))
        if has_board:
            seen = scalars(tmp_path / "keras" / "train")
            assert seen[f"epoch_{name}"] == pytest.approx(own[name])


def test_a_summary_in_the_logs(tmp_path):
    """Tests totals in the logs, and numbers of each layer beside them."""
    model = filled(make_functional)
    tf_deform.make_deformable(model, verbose=False)
    displace(model)
    names = monitored(model, images()).keys()
    monitor = SamplingMonitor(images(), log_dir=tmp_path, summary=True)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    logs = model.fit(
        images(), np.zeros((2, 3)), epochs=2, verbose=0, callbacks=[monitor]
    ).history
    assert monitor.history.keys() == names
    for key, total in zip(KEYS, (np.mean, np.max, np.mean, np.mean)):
        parts = [monitor.history[x] for x in names if x.startswith(f"{key}/")]
        assert len(parts) > 1
        assert logs.pop(key) == pytest.approx(total(parts, axis=0))
    assert not any("/" in name for name in logs)
    assert scalars(tmp_path).keys() == names
    for name, values in scalars(tmp_path).items():
        assert list(values.values()) == pytest.approx(monitor.history[name])
    # One more training begins anew, as `History` does.
    monitor.on_train_begin()
    assert monitor.history == {}


def scalars(folder) -> dict[str, dict[int, float]]:
    """Reads TensorBoard's files: values by step, by tag."""
    found = {}
    for path in folder.glob("events.out.tfevents*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, {})[event.step] = number
    return found


class Batches(keras.utils.Sequence):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return data(4)


def test_where_images_come_from():
    model = small()
    displace(model)
    x, y = data(4)
    expected = monitored(model, x)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    for given in (
        tf.constant(x),
        dataset,
        dataset.map(lambda x, y: x),
        Batches(),
        data(20)[0][:4],
    ):
        assert monitored(model, given) == expected
        assert SamplingMonitor(given)._images.shape == x.shape  # no labels
    one = monitored(model, x[:1])
    assert one != expected
    assert monitored(model, dataset, count=1) == one
    eight, nine = (monitored(model, data(16)[0][:n]) for n in (8, 9))
    assert eight == nine


def epochs(monitor, model, count=1):
    monitor.set_model(model)
    monitor.on_train_begin()
    for epoch in range(count):
        monitor.on_epoch_end(epoch, {})


@pytest.fixture
def warned():
    """Returns a function that returns the texts of a call's warnings."""

    def collect(function, *args, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(*args, **options)
        return [
            str(each.message)
            for each in found
            if each.category is RuntimeWarning
        ]

    return collect


def test_it_warns_of_offsets_that_explode(warned):
    model = small()
    x = data(4)[0]
    layer = model.get_layer("deformed")
    bias = np.zeros(27, np.float32)

    def shifted(pixels):
        bias[:18:2] = pixels
        layer.offset_bias.assign(bias)
        # "valid": 8 rows, of which the taps reach all.
        return warned(epochs, SamplingMonitor(x), model, 4)

    assert shifted(3) == []
    (text,) = shifted(5)
    assert f"{NAME} (67% of the samples have left" in text
    assert "mean |offset| 5 pixels" in text
    assert "bound is 50% of those that a plain" in text
    assert "no gradient" in text


def test_padding_is_no_explosion(warned):
    """Tests a map of one pixel, of whose samples most are outside anyway."""
    image = keras.Input((1, 1, 2))
    layer = tf_deform.layers.DeformableConv2D(2, 3, padding="same", name="d")
    model = keras.Model(image, layer(image))
    layer.offset_bias.assign(tf.fill((18,), 0.1))
    monitor = SamplingMonitor(np.ones((1, 1, 1, 2), np.float32))
    assert warned(epochs, monitor, model) == []
    layer.offset_bias.assign(tf.fill((18,), 2.0))
    (text,) = warned(epochs, monitor, model)
    assert "100% of the samples have left the image" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_it_warns_of_no_numbers(value, warned):
    model = small()
    layer = model.get_layer("deformed")
    for channel in (0, 20):  # a displacement, a factor
        bias = np.zeros(27, np.float32)
        bias[channel] = value
        layer.offset_bias.assign(bias)
        monitor = SamplingMonitor(data(4)[0])
        (text,) = warned(epochs, monitor, model, 2)
        assert f"{NAME} (11% of the samples)" in text
        assert "no numbers: " in text


def test_logs_of_no_numbers():
    model = small()
    bias = np.zeros(27, np.float32)
    bias[0] = np.nan
    model.get_layer("deformed").offset_bias.assign(bias)
    with pytest.warns(RuntimeWarning, match="no numbers"):
        logs = short(monitored(model, data(4)[0]))
    assert np.isnan(logs["offset_mean"])
    assert np.isnan(logs["offset_p99"])
    assert logs["outside"] == pytest.approx(1 / 9)


def test_it_warns_of_offsets_that_never_move(warned, monkeypatch):
    monkeypatch.setattr(_monitor, "_STEPS", 0)
    x = data(4)[0]
    model = small()
    assert warned(epochs, SamplingMonitor(x), model, 2) == []
    (text,) = warned(epochs, SamplingMonitor(x), model, 5)
    assert "never move: " in text
    assert f"{NAME} (trainable). After 3 epochs" in text
    assert warned(fit, model, SamplingMonitor(x), epochs=4) == []
    model = small()
    model.get_layer("deformed").trainable = False
    model.compile("sgd", "mse")
    (text,) = warned(fit, model, SamplingMonitor(x), epochs=1)
    assert f"{NAME} (frozen). After 1 epochs" in text


@pytest.mark.parametrize("begin", [0, 90])
def test_it_waits_for_steps(begin, warned):
    """Tests that steps of an earlier training do not count."""
    monitor, model = SamplingMonitor(data(4)[0]), small()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.optimizer.iterations.assign(begin)
    for steps, number in ((99, 0), (100, 1)):

        def train(steps=steps):
            monitor.set_model(model)
            monitor.on_train_begin()
            model.optimizer.iterations.assign_add(steps)
            for epoch in range(5):
                monitor.on_epoch_end(epoch, {})
            monitor.on_train_end()

        texts = warned(train)
        assert len(texts) == number
    assert "After 3 epochs of 100 steps" in texts[0]


def test_a_rate_of_zero_for_offsets_is_noticed(warned, monkeypatch):
    monkeypatch.setattr(_monitor, "_STEPS", 3)
    model = small()
    optimizer = tf_deform.training.deformable_optimizer(
        keras.optimizers.Adam(0.01), 0
    )
    model.compile(optimizer, "mse")
    (text,) = warned(fit, model, SamplingMonitor(data(4)[0]))
    assert "never move" in text


def test_given_offsets_are_not_measured(warned):
    image, offset = keras.Input((6, 6, 2)), keras.Input((4, 4, 18))
    x = tf_deform.layers.DeformableConv2D(2, 3, name="given")(image, offset)
    inputs = [np.ones((1, *each.shape[1:]), "f") for each in (image, offset)]
    with pytest.raises(ValueError, match="1 deformable convolutions, of which"):
        monitored(keras.Model([image, offset], x), inputs)
    y = tf_deform.layers.DeformableConv2D(2, 3, name="own")(image)
    model = keras.Model([image, offset], layers.Add()([x, y]))
    displace(model, 0.3)
    monitor = SamplingMonitor(inputs)
    (text,) = warned(epochs, monitor, model, 2)
    assert "not measured: given. They were given their offsets" in text


@pytest.mark.parametrize(
    "given",
    [
        None,
        "images",
        3,
        [],
        np.zeros((0, 8, 8, 2)),
        np.array(["text"]),
        [1.0, 2.0],
        tf.data.Dataset.range(0),
        np.float32(0),
    ],
    ids=str,
)
def test_bad_images(given):
    with pytest.raises(ValueError, match="Expected `images` to be a batch"):
        SamplingMonitor(given)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("count", 0, ValueError),
        ("count", 1.5, TypeError),
        ("log_dir", 3, TypeError),
        ("summary", "yes", TypeError),
        ("log_dir", __file__, ValueError),
    ],
)
def test_bad_arguments(name, value, error):
    with pytest.raises(error, match=f"Expected `{name}` to .* Received: "):
        SamplingMonitor(data()[0], **{name: value})


def test_bad_models():
    """Tests that training does not begin, and a later one is as before."""
    model = small()
    before = model.get_weights()
    wrong = SamplingMonitor(np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"shapes \(2, 8, 8, 3\), and the err"):
        fit(model, wrong)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(new, old)
    assert not tf.config.functions_run_eagerly()
    plain = keras.Sequential([keras.Input(SIZE), layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="with 0 deformable convolutions"):
        monitored(plain, images())
