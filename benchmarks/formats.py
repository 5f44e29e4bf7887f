# SPDX-License-Identifier: Apache-2.0
"""Inference in every format of `tf_deform.export`, side by side.

    python benchmarks/formats.py

Each file is compared with the model when it is written, and here once more for
every batch, before anything is timed. All formats take turns in one process,
and have the same number of threads.
"""

import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import openvino  # noqa: E402
import tensorflow as tf  # noqa: E402
import timing  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402
from contenders import configure_tensorflow  # noqa: E402
from report import markdown  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import openvino_extension  # noqa: E402
from xla import make, make_parser  # noqa: E402

from tf_deform import export  # noqa: E402

# Bounds the difference relative to the largest output: float32 sums are in
# another order.
TOLERANCE = 1e-4
KERAS = "Keras, tf.function"

# Takes images; returns logits.
Run = Callable[[np.ndarray], np.ndarray]


def displace(model: keras.Model) -> None:
    """Displaces samples as training does: new layers displace none."""
    for variable in model.trainable_variables:
        if "offset" in variable.path:
            variable.assign(tf.random.normal(variable.shape, stddev=0.1))


def load_saved_model(path: str) -> Run:
    loaded = tf.saved_model.load(path)
    return lambda images: loaded.serve(images).numpy()


def load_onnx(path: str, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def load_litert(path: str, threads: int) -> Run:
    interpreter = Interpreter(path, num_threads=threads)
    runner = interpreter.get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    return lambda images: next(iter(runner(**{name: images}).values()))


def load_openvino(path: str, threads: int) -> Run:
    core = openvino.Core()
    core.add_extension(openvino_extension.deform_conv())
    options = {"INFERENCE_NUM_THREADS": threads}
    options["INFERENCE_PRECISION_HINT"] = "f32"  # the default may be bfloat16
    compiled = core.compile_model(path, "CPU", options)
    return lambda images: compiled([images])[0]


def load_all(
    model: keras.Model, folder: str, threads: int
) -> dict[str, tuple[Run, float]]:
    """Writes and loads every format; returns functions and sizes in MiB."""
    names = ("native", "portable", "model.onnx", "model.tflite")
    native, portable, onnx, litert = (os.path.join(folder, n) for n in names)
    sizes = [
        report.size / 2**20
        for report in (
            export.saved_model(model, native),
            export.saved_model(model, portable, "portable"),
            export.onnx(model, onnx),
            export.litert(model, litert),
        )
    ]
    function = tf.function(lambda images: model(images, training=False))
    return {
        KERAS: (lambda images: function(images).numpy(), 0.0),
        "SavedModel, native": (load_saved_model(native), sizes[0]),
        "SavedModel, portable": (load_saved_model(portable), sizes[1]),
        "ONNX, ONNX Runtime": (load_onnx(onnx, threads), sizes[2]),
        "ONNX, OpenVINO": (load_openvino(onnx, threads), sizes[2]),
        "LiteRT": (load_litert(litert, threads), sizes[3]),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    configure_tensorflow(arguments.threads)
    keras.utils.set_random_seed(0)
    model = make(arguments.model, deformable=True)
    displace(model)
    rng = np.random.default_rng(0)
    shape, dtype = model.input_shape[1:], model.inputs[0].dtype
    images = rng.integers(0, 256, (max(arguments.batches), *shape))
    if np.issubdtype(dtype, np.floating):
        images = images / 255
    images = images.astype(dtype)

    with tempfile.TemporaryDirectory() as folder:
        loaded = load_all(model, folder, arguments.threads)
        medians: dict[str, list[float]] = {name: [] for name in loaded}
        for batch in arguments.batches:
            given = images[:batch]
            expected = loaded[KERAS][0](given)
            for name, (run, _) in loaded.items():
                error = np.abs(run(given) - expected).max()
                if not error <= TOLERANCE * np.abs(expected).max():
                    sys.exit(
                        f"Expected {name} to give what Keras gives. Received "
                        f"a difference of {error:g}"
                    )
            calls = {
                name: functools.partial(run, given)
                for name, (run, _) in loaded.items()
            }
            found = timing.medians(calls, arguments.repeats)
            for name, milliseconds in found.items():
                medians[name].append(milliseconds)

    rows = [
        [
            name,
            *(f"{ms:.2f}" for ms in medians[name]),
            f"{size:.1f}" if size else "",
        ]
        for name, (_, size) in loaded.items()
    ]
    heads = [f"ms, batch {batch}" for batch in arguments.batches]
    print(f"\n{markdown(['format', *heads, 'MiB'], rows, words=1)}")


if __name__ == "__main__":
    main()
