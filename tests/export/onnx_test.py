# SPDX-License-Identifier: Apache-2.0
"""ONNX: control flow, resizing, what lies outside of an image, and refusals."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from exported import CLOSE, assert_close, random, run, write

import tf_deform
from tf_deform.export import _onnx_graph, _onnx_handlers
from tf_deform.layers import DeformableConv2D

KERNEL = random(3, 3, 4, 4, seed=1) / 5
KERNELS = {
    "array": KERNEL,
    "variable": tf.Variable(KERNEL),
    "tensor": tf.constant(KERNEL),
}
IMAGE = tf.TensorSpec((None, None, None, 4), "float32", "x")
OFFSET = tf.TensorSpec((None, None, None, 18), "float32", "o")
X, SHIFTS = random(3, 8, 9, 4, seed=2), random(3, 8, 9, 18, seed=3)


def convolve(x, o, kernel=KERNELS["tensor"], mask=None, **options):
    options = {"padding": "same", **options}
    return tf_deform.ops.deformable_conv2d(x, kernel, o, mask, **options)


def assert_equal(function, path, samples, opset=19, tolerance=CLOSE):
    """A function and its file agree on all samples; the file's nodes."""
    names = [spec.name for spec in function.input_signature]
    write("onnx", function, path, opset=opset, sample=samples[0])
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(x.domain, x.version) for x in proto.opset_import] == [("", opset)]
    nodes = [node.op_type for node in _onnx_graph.walk(proto.graph)]
    for sample in samples:
        inputs = dict(zip(names, sample, strict=True))
        received = run("onnx", path, inputs)
        expected = function(*map(tf.constant, sample))
        if not isinstance(expected, dict):
            expected = {"output_0": expected}
        for name, value in expected.items():
            assert_close(received[name], value, tolerance)
    return nodes


# Control flow. Each takes images, offsets and a kernel.
def loop(x, o, kernel, steps=3, **options):
    return tf.while_loop(
        lambda i, h: i < steps,
        lambda i, h: (i + 1, tf.tanh(convolve(h, o, kernel, **options))),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def condition(x, o, kernel, **options):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, o, kernel, **options),
        lambda: x,
    )


def scan(x, o, kernel, **options):
    return tf.scan(
        lambda h, step: tf.tanh(convolve(h, step[None], kernel, **options)),
        o,
        x[:1],
    )


def each(x, o, kernel, **options):
    return tf.map_fn(
        lambda pair: convolve(pair[0][None], pair[1][None], kernel, **options)[
            0
        ],
        (x, o),
        fn_output_signature=tf.TensorSpec((None, None, 4)),
    )


def kernel_for_each(x, o, kernel):
    kernels = tf.stack([kernel, 2 * kernel, -kernel])
    return tf.map_fn(
        lambda item: convolve(item[0][None], item[1][None], item[2])[0],
        (x, o, kernels),
        fn_output_signature=tf.TensorSpec((None, None, 4)),
    )


def kernel_that_changes(x, o, kernel):
    return tf.while_loop(
        lambda i, h, k: i < 3,
        lambda i, h, k: (i + 1, convolve(h, o, k), k * 0.9),
        (0, x, kernel),
        shape_invariants=(
            tf.TensorShape(()),
            IMAGE.shape,
            tf.TensorShape((3, 3, 4, 4)),
        ),
    )[1]


def condition_in_loop(x, o, kernel):
    return tf.while_loop(
        lambda i, h: i < 3,
        lambda i, h: (
            i + 1,
            tf.cond(i > 1, lambda: convolve(h, o, kernel), lambda: tf.tanh(h)),
        ),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def loop_in_condition(x, o, kernel):
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: loop(x, o, kernel),
        lambda: loop(x, -o, kernel, 2),
    )


def conditions_in_conditions(x, o, kernel):
    return tf.case(
        [
            (tf.reduce_sum(x) > 9, lambda: convolve(x, o, kernel)),
            (tf.reduce_sum(x) > 0, lambda: convolve(x, -o, 2 * kernel)),
        ],
        default=lambda: condition(-x, o, kernel),
    )


def one_function_twice(x, o, kernel):
    @tf.function
    def inner(x, o):
        for _ in tf.range(2):
            if tf.reduce_sum(x) > 0:
                x = convolve(x, o, kernel)
        return tf.ensure_shape(x, IMAGE.shape)

    return inner(x, o) + inner(x, 2 * o)


def call_in_loop(x, o, kernel):
    @tf.function
    def inner(x):
        for _ in tf.range(2):
            x = convolve(x, o, kernel)
        return tf.ensure_shape(x, IMAGE.shape)

    return tf.while_loop(
        lambda i, h: i < 2,
        lambda i, h: (i + 1, tf.tanh(inner(h))),
        (0, x),
        shape_invariants=(tf.TensorShape(()), IMAGE.shape),
    )[1]


def groups_and_mask(x, o, kernel):
    return scan(
        x,
        o,
        kernel[:, :, :2],
        mask=tf.sigmoid(o[:1, :, :, :9]),
    )


def offset_groups_and_strides(x, o, kernel):
    offset = tf.concat([o, -o], -1)[:, ::2, ::2]
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, offset, kernel, strides=2, offset_groups=2),
        lambda: x[:, ::2, ::2],
    )


def dilated(x, o, kernel):
    offset = o[:, 2:-2, 2:-2]
    return tf.cond(
        tf.reduce_sum(x) > 0,
        lambda: convolve(x, offset, kernel, padding="valid", dilation_rate=2),
        lambda: x[:, 2:-2, 2:-2],
    )


def clamped(x, o, kernel):
    return condition(x, o, kernel, boundary="clamp")


CONTROL_FLOW = [
    (loop, "tensor", 19),
    (loop, "variable", 22),
    (condition, "array", 19),
    (condition, "variable", 20),
    (condition, "tensor", 21),
    (scan, "tensor", 20),
    (each, "tensor", 22),
    (kernel_for_each, "variable", 19),
    (kernel_that_changes, "tensor", 19),
    (condition_in_loop, "variable", 21),
    (loop_in_condition, "tensor", 22),
    (conditions_in_conditions, "variable", 19),
    (one_function_twice, "tensor", 19),
    (call_in_loop, "variable", 20),
    (groups_and_mask, "variable", 22),
    (offset_groups_and_strides, "tensor", 19),
    (dilated, "variable", 19),
    (clamped, "tensor", 19),
]


@pytest.mark.parametrize(
    ("body", "kernel", "opset"),
    CONTROL_FLOW,
    ids=[f"{f.__name__}-{kernel}" for f, kernel, _ in CONTROL_FLOW],
)
def test_functions_with_control_flow(body, kernel, opset, tmp_path):
    function = tf.function(
        lambda x, o: body(x, o, KERNELS[kernel]), [IMAGE, OFFSET]
    )
    samples = [
        (x, o)
        for x, o in (
            (np.abs(X), SHIFTS),
            (-np.abs(X), SHIFTS),
            (np.abs(X[:, :5, :7]) / 90, SHIFTS[:, :5, :7]),
        )
    ]
    nodes = assert_equal(function, tmp_path / "model", samples, opset)
    assert "Loop" in nodes or "If" in nodes
    assert ("DeformConv" in nodes) == (body is not clamped)


@pytest.mark.parametrize("opset", [19, 22])
def test_a_kernel_that_is_an_input(opset, tmp_path):
    kernel = tf.TensorSpec(KERNEL.shape, "float32", "k")
    function = tf.function(
        lambda x, o, k: condition(x, o, k) + loop(x, o, k),
        [IMAGE, OFFSET, kernel],
    )
    samples = [(np.abs(X), SHIFTS, KERNEL), (-np.abs(X), SHIFTS, 2 * KERNEL)]
    nodes = assert_equal(function, tmp_path / "model", samples, opset)
    assert nodes.count("DeformConv") == 2


def test_pooling_in_control_flow(tmp_path):
    rois = np.array(
        [
            [0, 1, 1, 20, 30],
            [1, 0, 0, 9, 9],
            [-1, 0, 0, 0, 0],
            [2, 3, 3, 60, 50],
        ],
        "float32",
    )
    shifts = tf.constant(random(4, 3, 3, 2))

    def align(x):
        return tf_deform.ops.deformable_roi_align(
            x, rois, shifts, pooled_size=3, spatial_scale=0.25
        )

    def psroi(x):
        return tf_deform.ops.deformable_psroi_pool(
            x,
            rois,
            shifts,
            output_dim=1,
            group_size=2,
            part_size=3,
            pooled_size=3,
            spatial_scale=0.25,
        )

    def body(x):
        return {
            "cond": tf.cond(
                tf.reduce_sum(x) > 0, lambda: align(x), lambda: align(x) * 0
            ),
            "map": tf.map_fn(lambda s: psroi(x * s), tf.constant([1.0, 2.0])),
        }

    function = tf.function(body, [IMAGE])
    assert_equal(function, tmp_path / "model", [(np.abs(X),), (-np.abs(X),)])


class Under(keras.layers.Layer):
    """A layer under a condition or in a loop, by Keras' functions."""

    def __init__(self, layer, form):
        super().__init__()
        self.layer, self.form = layer, form

    def build(self, shape):
        self.layer.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        ops = keras.ops
        if self.form == "cond":
            return ops.cond(ops.mean(x) > 0, lambda: self.layer(x), lambda: x)
        if self.form == "while":
            return ops.while_loop(
                lambda i, h: i < 2,
                lambda i, h: (i + 1, self.layer(h)),
                (0, x),
            )[1]
        if self.form == "fori":
            return ops.fori_loop(0, 2, lambda i, h: self.layer(h), x)
        return ops.map(lambda image: self.layer(image[None])[0], x)


class Align(keras.layers.Layer):
    """A cell that aligns what it remembers with the next frame."""

    def __init__(self, **options):
        super().__init__()
        self.state_size = self.output_size = 8 * 9 * 2
        self.layer = DeformableConv2D(2, 3, padding="same", **options)

    def build(self, shape):
        self.layer.build((None, 8, 9, 4))

    def call(self, frame, states):
        ops = keras.ops
        maps = [ops.reshape(x, (-1, 8, 9, 2)) for x in (frame, states[0])]
        maps = ops.tanh(self.layer(ops.concatenate(maps, -1)))
        outputs = ops.reshape(maps, (-1, self.state_size))
        return outputs, [outputs]


def deformable(filters=4, **options):
    return DeformableConv2D(filters, 3, padding="same", **options)


MAPS, FRAMES, FLAT = (8, 9, 4), (3, 8, 9, 4), (None, 8 * 9 * 2)
LAYERS = {
    "cond": (MAPS, lambda: Under(deformable(), "cond")),
    "cond of any size": ((None, None, 4), lambda: Under(deformable(), "cond")),
    "cond, modulated": (
        MAPS,
        lambda: Under(deformable(modulation="sigmoid"), "cond"),
    ),
    "cond, plain": (
        MAPS,
        lambda: Under(keras.layers.Conv2D(4, 3, padding="same"), "cond"),
    ),
    "cond, separable": (
        MAPS,
        lambda: Under(
            keras.layers.SeparableConv2D(4, 3, padding="same"), "cond"
        ),
    ),
    "while": (MAPS, lambda: Under(deformable(modulation="2sigmoid"), "while")),
    "fori": (MAPS, lambda: Under(deformable(groups=2), "fori")),
    "map": (MAPS, lambda: Under(deformable(offset_groups=2), "map")),
    "RNN": (FLAT, lambda: keras.layers.RNN(Align(modulation="sigmoid"))),
    "RNN, clamped": (
        FLAT,
        lambda: keras.layers.RNN(
            Align(boundary="clamp"), return_sequences=True, go_backwards=True
        ),
    ),
    "TimeDistributed": (
        FRAMES,
        lambda: keras.layers.TimeDistributed(deformable(5)),
    ),
    "ConvLSTM2D": (
        FRAMES,
        lambda: keras.Sequential(
            [keras.layers.ConvLSTM2D(3, 3, padding="same"), deformable(2)]
        ),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_control_flow(kind, tmp_path):
    keras.utils.set_random_seed(0)
    shape, make = LAYERS[kind]
    image = keras.Input(shape, name="x")
    model = keras.Model(image, make()(image))
    for weight in model.weights:
        if "offset" in weight.path:
            weight.assign(random(*weight.shape) / 5)
    opset = 19 if len(kind) % 2 else 22
    known = [old or new for old, new in zip(shape, (5, 7), strict=False)]
    image = np.abs(random(2, *known, *shape[2:]))
    write("onnx", model, tmp_path / "model", opset=opset, sample=image)
    for x in (image, -image):
        received = run("onnx", tmp_path / "model", {"x": x})
        assert_close(received["output_0"], model(x, training=False))


def test_opsets_differ_in_what_is_known():
    """Raising a model is no more than a number, but for `CHANGED`."""
    names = {
        s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain
    }
    changed = set()
    for name in names:
        try:
            old = onnx.defs.get_schema(name, _onnx_handlers.OPSET, "")
        except onnx.defs.SchemaError:
            continue  # Newer than that.
        if old.deprecated:
            continue
        for opset in range(19, 23):
            new = onnx.defs.get_schema(name, opset, "")
            same = not new.deprecated
            same &= new.min_input <= old.min_input
            same &= [x.name for x in new.inputs[: len(old.inputs)]] == [
                x.name for x in old.inputs
            ]
            for key, attribute in old.attributes.items():
                same &= key in new.attributes and (
                    new.attributes[key].default_value == attribute.default_value
                )
            same &= not any(
                attribute.required
                for key, attribute in new.attributes.items()
                if key not in old.attributes
            )
            if not same:
                changed.add(name)
    # Its inputs' meaning changed, and not how they look.
    assert changed | {"GroupNormalization"} == set(_onnx_graph.CHANGED)


# Resizing.
METHODS = {
    "bicubic": lambda x, size: tf.image.resize(x, size, "bicubic"),
    "old bicubic": lambda x, size: tf.compat.v1.image.resize_bicubic(x, size),
    "bilinear": lambda x, size: tf.image.resize(x, size),
    "nearest": lambda x, size: tf.image.resize(x, size, "nearest"),
    "old nearest": lambda x, size: tf.compat.v1.image.resize_nearest_neighbor(
        x, size
    ),
    "corners, nearest": lambda x, size: (
        tf.compat.v1.image.resize_nearest_neighbor(x, size, align_corners=True)
    ),
    "corners": lambda x, size: tf.compat.v1.image.resize_bilinear(
        x, size, align_corners=True
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_of_sizes(method, tmp_path):
    """Of those up to 64; a few of each size are compared by value."""
    function = tf.function(
        lambda x, size: METHODS[method](x, size),
        [
            tf.TensorSpec((None, None, None, 3), "float32", "x"),
            tf.TensorSpec((2,), "int32", "size"),
        ],
    )
    path = tmp_path / "model"
    write("onnx", function, path, sample=[random(1, 5, 7, 3), [8, 9]])
    session = onnxruntime.InferenceSession(path)
    step, tolerance = 16, 2e-5
    if "nearest" in method:
        step, tolerance = 4, 0
    elif "bicubic" in method:
        # TensorFlow has the weights of four pixels in a table of 1024 steps.
        tolerance = 4e-3
    for old in range(1, 65):
        x = np.repeat(random(1, old, 2, 1, seed=old), 3, axis=3)
        for new in range(1, 65):
            size = np.array([new, 3], "int32")
            [received] = session.run(None, {"x": x, "size": size})
            assert received.shape == (1, new, 3, 3)
            if method == "nearest" or (old + new) % step == 0:
                assert_close(received, function(x, size), tolerance)


PAIRS = [(25, 38), (60, 500), (33, 47), (7, 3)]


def test_models_of_fixed_size(tmp_path):
    """`tf.image.resize` of several methods, and Keras' layers."""
    specs = [
        tf.TensorSpec((None, old, old, 3), "float32", f"x{old}")
        for old, _ in PAIRS
    ]
    layer = keras.layers.Resizing(11, 13, crop_to_aspect_ratio=True)
    upsampling = keras.layers.UpSampling2D(3, interpolation="bilinear")

    def body(*images):
        outputs = {}
        for x, (old, new) in zip(images, PAIRS, strict=True):
            for kind, method in METHODS.items():
                name = f"{old}_{kind.replace(', ', '_').replace(' ', '_')}"
                outputs[name] = method(x, (new, 5))
            outputs[f"{old}_up"] = upsampling(x)
            outputs[f"{old}_layer"] = layer(x)
        return outputs

    sample = [random(2, old, old, 3) for old, _ in PAIRS]
    function = tf.function(body, specs)
    assert_equal(function, tmp_path / "model", [sample], 22, 1e-3)


def test_resizing_of_bytes(tmp_path):
    """TensorFlow gives real numbers, and bytes where it takes the nearest."""
    function = tf.function(
        lambda x: {
            kind.replace(", ", "_").replace(" ", "_"): method(x, (11, 13))
            for kind, method in METHODS.items()
        },
        [tf.TensorSpec((None, None, 9, 3), "uint8", "x")],
    )
    sample = random(2, 8, 9, 3, dtype="uint8")
    assert_equal(function, tmp_path / "model", [(sample,)], 19, 1e-3)


@pytest.mark.parametrize("size", [(25, 38), (60, 50), (33, 47)])
def test_a_deformable_model_of_fixed_size(size, tmp_path):
    old, new = size
    image = keras.Input((old, old, 3), name="x")
    x = keras.layers.Resizing(new, new)(deformable(3)(image))
    x = keras.layers.Resizing(old, new, "nearest")(deformable(3)(x))
    model = keras.Model(image, x)
    report = write("onnx", model, tmp_path / "model")
    assert report.differences["output_0"] < CLOSE


# Places outside of the image.
FAR = [np.nan, np.inf, -np.inf, 1e10, -1e10, 3e38, -3e38, 1e5]


def scatter(array, seed):
    """Writes what is not a place in a tenth of an array."""
    array = array.copy()
    flat = array.reshape(-1)
    places = np.random.default_rng(seed).choice(
        flat.size, max(len(FAR), flat.size // 10), replace=False
    )
    flat[places] = np.resize(FAR, places.size)
    return array


@pytest.mark.parametrize("opset", [19, 22])
@pytest.mark.parametrize("boundary", ["zeros", "clamp"])
def test_convolution_far_outside(boundary, opset, tmp_path):
    mask = tf.TensorSpec((None, None, None, 9), "float32", "m")
    function = tf.function(
        lambda x, o, m: convolve(x, o, mask=m, boundary=boundary),
        [IMAGE, OFFSET, mask],
    )
    masks = np.abs(random(3, 8, 9, 9))
    sample = (X, scatter(SHIFTS, 0), masks)
    assert np.isfinite(function(*sample)).all()
    # Inside, arithmetic holds: what is NaN stays so.
    broken = masks.copy()
    broken[0, 4, 4, 4] = np.nan
    inside = (X, np.full_like(SHIFTS, 0.25), broken)
    assert np.isnan(function(*inside)[0, 4, 4]).all()
    assert np.isnan(function(*inside)).sum() == 4
    path = tmp_path / "model"
    names = ("x", "o", "m")
    write("onnx", function, path, opset=opset, sample=sample)
    for values in (sample, inside):
        received = run("onnx", path, dict(zip(names, values, strict=True)))
        expected = function(*values).numpy()
        np.testing.assert_allclose(
            received["output_0"], expected, 1e-5, 1e-5 * np.nanmax(expected)
        )


@pytest.mark.parametrize(
    ("kind", "opset"), [("align", 19), ("align, adaptive", 22), ("psroi", 22)]
)
def test_pooling_far_outside(kind, opset, tmp_path):
    def pool(x, rois, shifts):
        if kind == "psroi":
            return tf_deform.ops.deformable_psroi_pool(
                x,
                rois,
                shifts,
                output_dim=1,
                group_size=2,
                part_size=3,
                pooled_size=3,
                spatial_scale=0.25,
            )
        return tf_deform.ops.deformable_roi_align(
            x,
            rois,
            shifts,
            pooled_size=3,
            spatial_scale=0.25,
            sampling_ratio=2 if kind == "align" else 0,
        )

    function = tf.function(
        pool,
        [
            IMAGE,
            tf.TensorSpec((None, 5), "float32", "rois"),
            tf.TensorSpec((None, 3, 3, 2), "float32", "shifts"),
        ],
    )
    rois = np.tile(np.array([[1, 2, 1, 20, 30]], "float32"), (12, 1))
    for row, value in enumerate(FAR):
        rois[row, 1 + row % 4] = value
    shifts = scatter(random(12, 3, 3, 2), 1)
    samples = [(X, rois, random(12, 3, 3, 2)), (X, rois, shifts)]
    assert np.isfinite(function(*samples[1])).all()
    assert_equal(function, tmp_path / "model", samples, opset)


def test_a_branch_that_is_nan_is_seen(tmp_path):
    image = keras.Input((8, 9, 4), name="x")
    layer = deformable(3, modulation="sigmoid")
    model = keras.Model(image, layer(image))
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, np.nan))
    report = write("onnx", model, tmp_path / "model")
    assert report.differences["output_0"] == 0
    received = run("onnx", tmp_path / "model", {"x": X})
    assert np.isnan(received["output_0"]).all()


# Refusals.
def suppress(sigma):
    def body(boxes, scores):
        return tf.image.non_max_suppression_with_scores(
            boxes, scores, 5, 0.5, soft_nms_sigma=sigma
        )[1]

    return tf.function(
        body,
        [
            tf.TensorSpec((None, 4), "float32", "boxes"),
            tf.TensorSpec((None,), "float32", "scores"),
        ],
    )


BOXES = np.array([[0, 0, 2, 2], [0, 1, 2, 3], [5, 5, 6, 7]], "float32")
SCORES = np.array([0.9, 0.8, 0.7], "float32")


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.99, 1.0, 3.0])
def test_soft_suppression_is_refused(sigma, tmp_path):
    with pytest.raises(ValueError, match="Expected non-max.*soft_nms_sigma"):
        write("onnx", suppress(sigma), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_crops_are_exported(tmp_path):
    boxes = tf.TensorSpec((None, 4), "float32", "boxes")
    function = tf.function(
        lambda x, boxes: tf.image.crop_and_resize(x, boxes, [0, 2], (3, 4)),
        [IMAGE, boxes],
    )
    samples = [
        (X, np.array(values, "float32"))
        for values in (
            [[0.1, 0.2, 0.6, 0.8], [0, 0, 1, 1]],
            [[-0.3, 0.2, 0.6, 1.4], [0.8, 0.9, 0.1, 0.2]],
        )
    ]
    assert_equal(function, tmp_path / "model", samples)


def test_hard_suppression_is_exported(tmp_path):
    assert_equal(suppress(0.0), tmp_path / "model", [(BOXES, SCORES)])


def image_function(body):
    return tf.function(body, [tf.TensorSpec((1, 8, 9, 3), "float32", "x")])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: tf.image.resize(x, (4, 5), "area"), "'area'.*'nearest'"),
        (
            lambda x: tf.cond(
                tf.reduce_sum(x) > 0,
                lambda: tf.image.resize(x, (8, 9), "area"),
                lambda: x,
            ),
            "'area'.*'nearest'",
        ),
        (
            lambda x: tf.image.resize(x, (4, 5), antialias=True),
            "ScaleAndTranslate",
        ),
        (
            lambda x: tf.image.crop_and_resize(
                x, [[0.1, 0.2, 0.6, 0.8]], [0], (4, 5), "nearest"
            ),
            "'bilinear'.*'nearest'",
        ),
        (
            lambda x: tf.switch_case(
                tf.cast(x[0, 0, 0, 0], "int32"),
                [lambda: x, lambda: -x, lambda: 2 * x],
            ),
            "switch_case",
        ),
        (
            lambda x: keras.ops.scan(lambda c, y: (c + y, c), x[0, 0], x[0])[1],
            "keras.ops.scan.*tf.scan",
        ),
        (lambda x: tf.bitcast(x, "int32"), "Bitcast"),
        (
            lambda x: tf.map_fn(lambda h: tf.linalg.qr(h)[0], x),
            "Qr",
        ),
    ],
    ids=[
        "area",
        "area-in-cond",
        "antialias",
        "crop",
        "switch",
        "scan",
        "bitcast",
        "qr-in-map",
    ],
)
def test_the_reason_is_told(body, reason, tmp_path):
    with pytest.raises(ValueError, match=f"Expected .*{reason}"):
        write("onnx", image_function(body), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_handler_raises_is_told(tmp_path, monkeypatch):
    """Ours, and tf2onnx's own, which it only logs."""

    def fail(*_, **__):
        raise RuntimeError("out of cheese")

    monkeypatch.setitem(_onnx_handlers.HANDLERS, "SelectV2", fail)
    function = image_function(lambda x: tf.where(x > 0, x, -2 * x))
    with pytest.raises(ValueError, match="Received: out of cheese"):
        write("onnx", function, tmp_path / "model")
    monkeypatch.undo()
    function = tf.function(
        lambda boxes, scores: tf.image.combined_non_max_suppression(
            boxes, scores, 3, 3
        )[0],
        [
            tf.TensorSpec((1, 5, 2, 4), "float32", "boxes"),
            tf.TensorSpec((1, 5, 2), "float32", "scores"),
        ],
    )
    with pytest.raises(ValueError, match="Received: .* boxes shared across"):
        write("onnx", function, tmp_path / "model")


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Conv2D(3, 3),
        keras.layers.Conv2D(3, 3, strides=2, padding="same"),
        keras.layers.MaxPooling2D(2),
        deformable(3),
        deformable(3, boundary="clamp", modulation="sigmoid"),
    ],
)
def test_frames_of_unknown_number(layer, tmp_path):
    """What a loop leaves in a list has a shape that is known in Python alone.

    As many frames as sequences: in a graph, Keras 3.15 counts the latter.
    """
    frames = keras.Input((None, 6, 7, 2), name="x")
    model = keras.Model(frames, keras.layers.TimeDistributed(layer)(frames))
    for seed, weight in enumerate(model.weights):
        weight.assign(random(*weight.shape, seed=seed) / 5)
    x = random(3, 3, 6, 7, 2)
    write("onnx", model, tmp_path / "model", sample=x)
    received = run("onnx", tmp_path / "model", {"x": x[:2, :2]})
    assert_close(received["output_0"], model(x[:2, :2]))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_type_that_is_not_held_is_named(dtype, tmp_path):
    kernel = tf.cast(KERNEL, dtype)
    function = tf.function(
        lambda x: tf.nn.conv2d(x, kernel, 1, "SAME"),
        [tf.TensorSpec((1, 8, 9, 4), dtype, "x")],
    )
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){dtype}"):
        write("onnx", function, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_float64_where_it_is_held(tmp_path):
    function = tf.function(
        lambda x, o: convolve(x, o, tf.cast(KERNEL, "float64")),
        [
            tf.TensorSpec((None, None, None, 4), "float64", "x"),
            tf.TensorSpec((None, None, None, 18), "float64", "o"),
        ],
    )
    sample = (X.astype("float64"), SHIFTS.astype("float64"))
    assert_equal(function, tmp_path / "model", [sample], 19, 1e-12)
