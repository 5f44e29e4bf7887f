# SPDX-License-Identifier: Apache-2.0
"""Every kind of model in every format and runtime: the table of docs/export.md.

    pip install 'tf-deform[benchmark,examples,litert]'
    python benchmarks/export_table.py
    python benchmarks/export_table.py --only detector:onnx22-web resnet
    python benchmarks/export_table.py --only :tfjs --models

Each file is written in a process of its own, and run in another one in which
tf_deform is not there; what crashes or hangs is one cell's result. The numbers
are the largest difference from what the model gives here, relative to the
largest number of an output; of integers the share that differs. Branches are
random: samples move by one to two pixels.

Node.js (20 or newer) and npm are needed for what runs in them, and network for
the first call, which installs those runtimes and tensorflow.js' converter to
the folder of `--out`. What is there already is not written or run again, unless
`--again` or a newer version of the file asks for it.
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two processes at a time, of one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "export.md"
MARKS = "<!-- the table begins -->", "<!-- the table ends -->"

MODELS = {
    "segmenter": "segmenter",
    "detector": "detector",
    "resnet": "ResNet-50, 13 deformable layers",
    "recurrent": "recurrent alignment",
    "conditional": "conditional",
}
# The file or folder of each format. Keras wants these endings.
FILES = {
    "native": "native",
    "portable": "portable",
    "keras-saved-model": "keras_saved_model",
    "keras-onnx": "keras.onnx",
    "keras-openvino": "keras.xml",
    "keras-litert": "keras.tflite",
    "keras-torch": "keras.pt2",
    "onnx19": "opset19.onnx",
    "onnx22": "opset22.onnx",
    "litert": "float32.tflite",
    "litert-float16": "float16.tflite",
    "litert-dynamic": "dynamic.tflite",
    "litert-int8": "int8.tflite",
    "tfjs": "tfjs",
}
# By target: its row's first cells, the format, the runtime.
TARGETS = {
    "native": ("`export.saved_model`", "TensorFlow, op library"),
    "portable": ("`export.saved_model`, portable", "TensorFlow"),
    "portable-openvino": ("`export.saved_model`, portable", "OpenVINO"),
    "tfjs": ("`export.saved_model`, portable", "tensorflow.js, wasm"),
    "onnx19": ("`export.onnx`, opset 19", "ONNX Runtime"),
    "onnx19-node": ("`export.onnx`, opset 19", "onnxruntime-node"),
    "onnx19-web": ("`export.onnx`, opset 19", "onnxruntime-web, wasm"),
    "onnx19-openvino": ("`export.onnx`, opset 19", "OpenVINO, extension"),
    "onnx22": ("`export.onnx`, opset 22", "ONNX Runtime"),
    "onnx22-node": ("`export.onnx`, opset 22", "onnxruntime-node"),
    "onnx22-web": ("`export.onnx`, opset 22", "onnxruntime-web, wasm"),
    "onnx22-openvino": ("`export.onnx`, opset 22", "OpenVINO, extension"),
    "litert": ("`export.litert`", "LiteRT"),
    "litert-float16": ('`export.litert`, "float16"', "LiteRT"),
    "litert-dynamic": ('`export.litert`, "dynamic"', "LiteRT"),
    "litert-int8": ('`export.litert`, "int8"', "LiteRT"),
    "keras-saved-model": ("Keras, `tf_saved_model`", "TensorFlow, op library"),
    "keras-onnx": ("Keras, `onnx`", "ONNX Runtime"),
    "keras-openvino": ("Keras, `openvino`", "OpenVINO"),
    "keras-litert": ("Keras, `litert`", "LiteRT"),
    "keras-torch": ("Keras, `torch`", "PyTorch"),
}
# What tensorflow.js' converter imports with: newer ones of the others do not
# fit it, and it is not asked for newer.
CONVERTER = (
    "tensorflowjs==4.22.0",
    "tensorflow==2.19.0",
    "tensorflow-decision-forests==1.12.0",
    "ydf==0.12.0",
    "setuptools<81",
)
# One of its steps takes what is added to a product or a convolution for a bias,
# whatever its shape, and the wasm backend refuses such a bias: a residual sum
# of a plain ResNet, too. It runs without that step.
CONVERT = """
from tensorflowjs.converters import converter, normalize_bias_add
normalize_bias_add.normalize_bias_add_op = lambda graph: graph
converter.pip_main()
"""
# What a runtime says, in words that tell more.
REASONS = {
    "TensorListReserve": "LiteRT's builtin operations have no lists of "
    "tensors, of which `tf.scan` makes its loop",
    "Select TensorFlow op": "The file holds TensorFlow's operations beside "
    "LiteRT's (`tf.scan`'s lists of tensors): it needs LiteRT's Flex delegate",
    "requires PyTorch backend": "Keras writes it with its PyTorch backend "
    "alone, where layers made of TensorFlow's ops do not run",
    "without conditions around": "Refused: tf2onnx forgets shapes inside of "
    "conditions, and nothing loads the convolutions that it writes there",
    r"Cannot compute the outputs \[Identity\]": "tensorflow.js does not run "
    "the loop that its converter makes of `tf.scan`",
    "^executeAsync$": "By `executeAsync`; `execute` runs no conditions",
}
PACKAGES = (
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "ai-edge-quantizer",
)

# A difference that no rounding in float32 makes.
WRONG = 1e-2

# For each call the inputs, or the outputs, by name.
Cases = list[dict[str, np.ndarray]]


# The models.


def displace(layer: Any, size: float = 1.0) -> None:
    """Gives a layer's branch weights that move samples by 1 to 2 pixels.

    Args:
        layer: a layer of this package.
        size: root mean square of what the branch is given.
    """
    kernel, bias = layer.offset_kernel, layer.offset_bias
    rng = np.random.default_rng(len(layer.name))
    scale = 1 / (size * np.sqrt(np.prod(kernel.shape[:-1])))
    kernel.assign(rng.normal(size=kernel.shape) * scale)
    bias.assign(rng.normal(size=bias.shape))


def displace_all(model: Any, images: np.ndarray) -> None:
    """The same for the convolutions of a model, from the first to the last."""
    import keras

    import tf_deform

    for layer in model.layers:
        if isinstance(layer, tf_deform.layers.DeformableConv2D):
            before = keras.Model(model.inputs, layer.input)
            seen = np.asarray(before(images))
            displace(layer, float(np.sqrt(np.mean(seen**2))) + 1e-6)


def make_segmenter() -> tuple[Any, Any, Cases]:
    import segmentation

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1), "uint8")
    model = segmentation.build_model("dcn-v2")
    displace_all(model, images)
    return model, model, [{"image": images}]


def make_detector() -> tuple[Any, Any, Cases]:
    """The network, and the function that makes detections of what it gives."""
    import keras
    from detection import detector

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1), "uint8")
    model = detector.Detector("both")
    displace_all(model, images)
    head = model.get_layer("head")
    displace(head.score_pooling)
    displace(head.box_pooling)
    # Scores that are far enough apart for rounding not to reorder them.
    for name in ("objectness", "score_maps"):
        kernel = model.get_layer(name).kernel
        kernel.assign(kernel * 10)
    # Keras exports no dictionary with a tuple in it.
    outputs = {name: model.output[name] for name in ("proposals", "logits")}
    network = keras.Model(model.inputs, outputs)
    network.detect = model.detect
    return network, model.detect, [{"images": images}]


def make_resnet() -> tuple[Any, Any, Cases]:
    import resnet

    images = np.random.default_rng(0).normal(size=(1, 128, 128, 3))
    images = images.astype("float32")
    model = resnet.make_twin(resnet.make_plain(128))
    assert resnet.count_deformable(model) == resnet.NUM_LAYERS
    displace_all(model, images)
    return model, model, [{model.inputs[0].name: images}]


def make_recurrent() -> tuple[Any, Any, Cases]:
    """A state that each frame moves: the deformable layer aligns it."""
    import keras
    import tensorflow as tf

    import tf_deform

    class Alignment(keras.layers.Layer):
        def build(self, shape):
            self.encode = keras.layers.Conv2D(8, 3, padding="same")
            self.align = tf_deform.layers.DeformableConv2D(
                8, 3, padding="same", modulation="sigmoid"
            )
            self.encode.build((None, *shape[2:]))
            self.align.build((None, *shape[2:4], 8))
            displace(self.align, 0.5)

        def compute_output_shape(self, shape):
            return (*shape[:4], 8)

        def call(self, frames):
            frames = tf.transpose(frames, (1, 0, 2, 3, 4))
            states = tf.scan(
                lambda state, frame: tf.tanh(
                    self.encode(frame) + self.align(state)
                ),
                frames,
                tf.zeros((tf.shape(frames)[1], *frames.shape[2:4], 8)),
            )
            return tf.transpose(states, (1, 0, 2, 3, 4))

    inputs = keras.Input((4, 12, 14, 3), name="frames")
    model = keras.Model(inputs, Alignment()(inputs))
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(2, 4, 12, 14, 3)).astype("float32")
    return model, model, [{"frames": frames}]


def make_conditional() -> tuple[Any, Any, Cases]:
    """Deformable or plain, as the input says."""
    import keras

    import tf_deform

    class Choice(keras.layers.Layer):
        def build(self, shape):
            self.deformable, self.plain = (
                layer(8, 3, padding="same")
                for layer in (
                    tf_deform.layers.DeformableConv2D,
                    keras.layers.Conv2D,
                )
            )
            self.deformable.build(shape)
            self.plain.build(shape)
            displace(self.deformable)

        def compute_output_shape(self, shape):
            return (*shape[:-1], 8)

        def call(self, inputs):
            return keras.ops.cond(
                keras.ops.mean(inputs) > 0,
                lambda: self.deformable(inputs),
                lambda: self.plain(inputs),
            )

    inputs = keras.Input((12, 14, 3), name="image")
    model = keras.Model(inputs, Choice()(inputs))
    image = np.random.default_rng(0).normal(size=(2, 12, 14, 3))
    cases = [(image + shift).astype("float32") for shift in (0.5, -0.5)]
    return model, model, [{"image": image} for image in cases]


def make(name: str, folder: pathlib.Path) -> tuple[Any, Any, Cases]:
    """A model, what is exported of it, and inputs.

    The first call writes weights, inputs and outputs to the folder; the others
    read the weights.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    sys.path.insert(1, str(ROOT / "examples"))
    model, source, cases = globals()[f"make_{name}"]()
    weights = folder / "weights.npz"
    if weights.exists():
        values = np.load(weights)
        model.set_weights([values[str(i)] for i in range(len(values))])
        return model, source, cases
    for whose, run in (("keras", model), ("export", source)):
        for i, given in enumerate(cases):
            (value,) = given.values()
            outputs = keras.tree.flatten_with_path(run(tf.constant(value)))
            outputs = {
                "_".join(map(str, path)) or "output_0": np.asarray(array)
                for path, array in outputs
            }
            np.savez(folder / f"{whose}_{i}.npz", **outputs)
    np.savez(
        folder / "cases.npz",
        **{
            f"{i}/{name}": value
            for i, given in enumerate(cases)
            for name, value in given.items()
        },
    )
    values = model.get_weights()
    np.savez(weights, **{str(i): value for i, value in enumerate(values)})
    return model, source, cases


def write(name: str, format_: str, folder: pathlib.Path) -> None:
    """Writes one file, after the weights if there are none yet."""
    model, source, cases = make(name, folder)
    if format_ == "weights":
        return
    from tf_deform import export

    path = folder / FILES[format_]
    (value,) = cases[0].values()
    kind, _, option = format_.partition("-")
    if kind == "keras":
        model(value)  # That to ONNX wants it.
        formats = {"saved-model": "tf_saved_model"}
        model.export(str(path), format=formats.get(option, option))
        return
    arguments: dict[str, Any] = {"sample": [value], "verbose": False}
    if kind in ("native", "portable"):
        export.saved_model(source, path, kind, **arguments)
    elif kind.startswith("onnx"):
        export.onnx(source, path, int(kind.removeprefix("onnx")), **arguments)
    else:
        if option:
            # By how much it differs is for the table to say.
            arguments |= {"quantize": option, "tolerance": 1e9}
        if option == "int8":
            given = [value for case in cases for value in case.values()]
            arguments["calibration"] = [value[:1] for value in given] * 4
        export.litert(source, path, **arguments)


# The runtimes: from a file to a function of inputs by name.

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def load_tensorflow(path: str, native: bool) -> Run:
    import tensorflow as tf

    if native:
        tf.load_op_library(str(ROOT / "tf_deform" / "_ops.so"))
    loaded = tf.saved_model.load(path)
    signatures = loaded.signatures
    # Keras' has one input, of any name.
    run = signatures["serving_default"]
    (name,) = run.structured_input_signature[1]
    return lambda given: {
        key: value.numpy()
        for key, value in run(
            **{name: tf.constant(next(iter(given.values())))}
        ).items()
    }


def load_onnxruntime(path: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    (name,) = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    return lambda given: dict(
        zip(
            names,
            session.run(None, {name: next(iter(given.values()))}),
            strict=True,
        )
    )


def load_openvino(path: str) -> Run:
    import openvino

    sys.path.insert(1, str(ROOT / "examples"))
    import openvino_extension

    core = openvino.Core()
    if path.endswith(".onnx"):
        core.add_extension(openvino_extension.deform_conv())
    # Or it computes in bfloat16 where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(path, "CPU", options)
    # Keras' export may list what is left over inside beside outputs with such
    # names.
    outputs = [
        output
        for output in compiled.outputs
        if path.endswith(".xml") and "Identity" in str(output.names)
    ] or compiled.outputs

    def call(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(list(given.values()))
        return {
            min(output.names, key=len, default=str(i)): found[output]
            for i, output in enumerate(outputs)
        }

    return call


def load_litert(path: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(path, num_threads=1).get_signature_runner()
    (name,) = runner.get_input_details()
    return lambda given: runner(**{name: next(iter(given.values()))})


def run_in_node(
    script: str, argument: str, path: pathlib.Path, cases: Cases
) -> tuple[Cases, str]:
    """Runs a file in Node.js: outputs, and what the script noted."""
    folder = path.parent / f"node_{path.stem}_{pathlib.Path(argument).name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    listed = []
    for i, given in enumerate(cases):
        listed.append([])
        for name, value in given.items():
            file = f"given_{i}_{name}.bin"
            (folder / file).write_bytes(value.tobytes())
            listed[-1].append(
                {
                    "name": name,
                    "dtype": str(value.dtype),
                    "shape": value.shape,
                    "file": file,
                }
            )
    (folder / "cases.json").write_text(json.dumps(listed))
    home = path.parent.parent / "node"
    done = subprocess.run(
        ["node", home / script, argument, path, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = re.findall(r"^\S*Error: .*", done.stderr, re.MULTILINE)
        raise RuntimeError(
            lines[0].split(": ", 1)[1]
            if lines
            else f"Node.js ended with {done.returncode}: {done.stderr[-200:]}"
        )
    answers = json.loads((folder / "answers.json").read_text())
    received = [
        {
            tensor["name"]: np.frombuffer(
                (folder / tensor["file"]).read_bytes(), tensor["dtype"]
            ).reshape(tensor["shape"])
            for tensor in case
        }
        for case in answers["answers"]
    ]
    shutil.rmtree(folder)
    return received, answers["note"]


def run(name: str, target: str, folder: pathlib.Path) -> dict[str, Any]:
    """Runs a file in a runtime, and compares."""
    stored = np.load(folder / "cases.npz")
    cases: Cases = []
    for key in stored:
        index, _, label = key.partition("/")
        if int(index) == len(cases):
            cases.append({})
        cases[-1][label] = stored[key]
    format_ = find_format(target)
    path = folder / FILES[format_]
    note = ""
    if target == "tfjs":
        return run_tfjs(path, cases, folder)
    if target.endswith(("-node", "-web")):
        package = f"onnxruntime-{target.rpartition('-')[2]}"
        received, note = run_in_node("onnx.mjs", package, path, cases)
    else:
        if "openvino" in target:
            # A SavedModel is told from its folder.
            call = load_openvino(str(path))
        elif "onnx" in target:
            call = load_onnxruntime(str(path))
        elif "litert" in target:
            call = load_litert(str(path))
        else:
            call = load_tensorflow(str(path), native=target != "portable")
        received = [call(given) for given in cases]
    whose = "keras" if target.startswith("keras") else "export"
    return {"difference": compare_all(folder, whose, received), "note": note}


def run_tfjs(
    path: pathlib.Path, cases: Cases, folder: pathlib.Path
) -> dict[str, Any]:
    """With the wasm backend; if that fails, with the one in JavaScript."""
    wrong = ""
    for backend in ("wasm", "cpu"):
        try:
            received, note = run_in_node("tfjs.mjs", backend, path, cases)
            difference = compare_all(folder, "export", received)
        except RuntimeError as error:
            if backend == "cpu":
                raise
            wrong = str(error)
            continue
        if backend == "cpu":
            note = f"In plain JavaScript; with wasm: {wrong}"
        if difference < WRONG or backend == "cpu":
            return {"difference": difference, "note": note}
        wrong = f"a difference of {difference:.1g}"
    raise AssertionError


def compare_all(folder: pathlib.Path, whose: str, received: Cases) -> float:
    return max(
        compare(dict(np.load(folder / f"{whose}_{i}.npz")), dict(outputs))
        for i, outputs in enumerate(received)
    )


def compare(expected: dict, received: dict) -> float:
    """The largest difference of any output."""
    if len(expected) != len(received):
        raise ValueError(
            f"Expected {len(expected)} outputs. Received: {len(received)}"
        )
    if expected.keys() != received.keys():
        # Other names: in their order.
        received = dict(zip(expected, received.values(), strict=True))
    return max(
        measure(expected[name], np.asarray(received[name])) for name in expected
    )


def measure(expected: np.ndarray, received: np.ndarray) -> float:
    if expected.shape != received.shape:
        raise ValueError(
            f"Expected shape {expected.shape}. Received: {received.shape}"
        )
    if expected.dtype.kind in "biu":
        return float(np.mean(expected != received))
    delta = np.abs(expected.astype("float64") - received).max(initial=0)
    largest = np.abs(expected).max(initial=0)
    return float(delta / largest) if delta else 0.0


# The table.


def find_format(target: str) -> str:
    """The format that a target runs."""
    for ending in ("-node", "-web", "-openvino"):
        if not target.startswith("keras"):
            target = target.removesuffix(ending)
    return target


def spawn(
    command: Sequence[Any], timeout: float, **arguments: Any
) -> dict[str, Any]:
    """What a process says in its last line, or the reason why it does not."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **arguments,
    )
    try:
        printed, told = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Its children, too.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"no answer after {timeout:g} s"}
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"error": f"the process ended by {name}"}
    lines = printed.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        if process.returncode == 0:
            return {}
        lines = told.strip().splitlines() or [f"exit {process.returncode}"]
        return {"error": lines[-1]}


def install(out: pathlib.Path) -> dict[str, str]:
    """Installs what is not there yet; reasons by runtime where that failed."""
    reasons = {}
    node = out / "node"
    node.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "node").iterdir():
        shutil.copy(file, node / file.name)
    if not (node / "node_modules").exists():
        print("installing runtimes for Node.js", flush=True)
        try:
            # Without scripts: one would fetch libraries for GPUs.
            subprocess.run(
                ["npm", "install", "--ignore-scripts", "--no-package-lock"],
                cwd=node,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reasons["node"] = f"npm install: {error}"
    if not converter(out).exists():
        print("installing tensorflow.js' converter", flush=True)
        try:
            home = out / "converter.partial"
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run(
                [
                    *(home / "bin" / "python", "-m", "pip", "install", "-q"),
                    *CONVERTER,
                ],
                check=True,
            )
            home.rename(converter(out))
        except subprocess.CalledProcessError as error:
            reasons["tfjs"] = f"pip install: {error}"
    return reasons


def converter(out: pathlib.Path) -> pathlib.Path:
    return out / "converter"


class Table:
    """What is known so far, and how the rest is found out."""

    def __init__(self, out: pathlib.Path, timeout: float):
        self.out, self.timeout = out, timeout
        self.file = out / "results.json"
        self.results: dict[str, dict] = {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())["cells"]
        self.lock = threading.Lock()
        self.locks: dict[tuple[str, str], threading.Lock] = {}
        self.written: dict[tuple[str, str], dict] = {}
        self.reasons: dict[str, str] = {}

    def child(self, step: str, model: str, what: str) -> dict[str, Any]:
        path = os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        )
        return spawn(
            [sys.executable, __file__, step, model, what, "--out", self.out],
            self.timeout,
            env={**os.environ, "PYTHONPATH": path},
        )

    def write(self, model: str, format_: str) -> dict[str, Any]:
        """Writes a file once, however many ask for it."""
        key = model, format_
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.written:
                self.written[key] = self._write(model, format_)
            return self.written[key]

    def _write(self, model: str, format_: str) -> dict[str, Any]:
        folder = self.out / model
        folder.mkdir(parents=True, exist_ok=True)
        if format_ != "weights":
            before = self.write(model, "weights")
            if "error" in before:
                return before
            path = folder / FILES[format_]
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if format_ != "tfjs":
            return self.child("--write", model, format_)
        before = self.write(model, "portable")
        if "error" in before:
            return before
        done = spawn(
            [
                converter(self.out) / "bin" / "python",
                "-c",
                CONVERT,
                "--input_format=tf_saved_model",
                "--output_format=tfjs_graph_model",
                "--signature_name=serving_default",
                "--saved_model_tags=serve",
                folder / FILES["portable"],
                folder / FILES["tfjs"],
            ],
            self.timeout,
        )
        return done

    def fill(self, model: str, target: str) -> None:
        """Finds out what is in one cell."""
        runtime = "tfjs" if target == "tfjs" else None
        if target.endswith(("-node", "-web", "tfjs")):
            reason = self.reasons.get("node") or self.reasons.get(runtime)
            if reason:
                self.store(model, target, {"error": reason})
                return
        result = self.write(model, find_format(target))
        if "error" not in result:
            result = self.child("--run", model, target)
            if not result:
                result = {"error": "the process said nothing"}
        self.store(model, target, result)

    def store(self, model: str, target: str, result: dict) -> None:
        with self.lock:
            self.results[f"{model}:{target}"] = result
            self.save()
        said = result.get("error") or f"{result['difference']:.1g}"
        note = result.get("note")
        print(f"{model}:{target}: {said[:300]}", note or "", flush=True)

    def save(self) -> None:
        stored = {"versions": versions(), "cells": self.results}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(stored, indent=1) + "\n")
        partial.replace(self.file)

    def render(self) -> str:
        """The table in Markdown, with reasons and versions below it."""
        reasons: list[str] = []

        def cite(reason: str) -> str:
            if reason not in reasons:
                reasons.append(reason)
            return f"[{reasons.index(reason) + 1}]"

        lines = [
            f"| format | runs in | {' | '.join(MODELS.values())} |",
            "|---|---|" + "---:|" * len(MODELS),
        ]
        for target, heads in TARGETS.items():
            cells = list(heads)
            for model in MODELS:
                result = self.results.get(f"{model}:{target}")
                if result is None:
                    cells.append("")
                elif "error" in result:
                    cells.append(f"no {cite(shorten(result['error']))}")
                else:
                    cell = format_number(result["difference"])
                    if result["note"]:
                        cell += f" {cite(shorten(result['note']))}"
                    cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        lines += [f"{i + 1}. {text}" for i, text in enumerate(reasons)]
        found = ", ".join(f"{k} {v}" for k, v in versions().items())
        lines += ["", f"Versions: {found}."]
        return "\n".join(lines)


def format_number(difference: float) -> str:
    if difference == 0:
        return "0"
    if difference >= 0.001:
        return f"{difference:.1g}"
    return f"{difference:.0e}".replace("e-0", "e-")


def shorten(reason: str) -> str:
    """One line of Markdown, without paths of this machine."""
    for pattern, words in REASONS.items():
        if re.search(pattern, reason):
            return words
    reason = re.sub(r"(/[\w.@+-]+){2,}/([\w.@+-]+)", r"\2", reason)
    reason = " ".join(reason.split())
    return reason if len(reason) <= 240 else reason[:237] + "..."


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        node = subprocess.run(
            ["node", "--version"], capture_output=True, text=True, check=True
        ).stdout
        found["Node.js"] = node.strip().removeprefix("v")
    except (OSError, subprocess.CalledProcessError):
        pass
    package = json.loads((HERE / "node" / "package.json").read_text())
    found |= package["dependencies"]
    found |= dict(pin.split("==") for pin in CONVERTER[:1])
    return found


def choose(only: Sequence[str], skip: Mapping[str, Any]) -> list[tuple]:
    """The cells that `--only` names: MODEL, :TARGET or MODEL:TARGET."""
    chosen = []
    for target in TARGETS:
        for model in MODELS:
            cell = f"{model}:{target}"
            names = {model, f":{target}", cell}
            if only and not names & set(only):
                continue
            if only or cell not in skip:
                chosen.append((model, target))
    known = {m for m in MODELS} | {f":{t}" for t in TARGETS}
    known |= {f"{m}:{t}" for m in MODELS for t in TARGETS}
    unknown = set(only) - known
    if unknown:
        sys.exit(
            "Expected MODEL, :TARGET or MODEL:TARGET of "
            f"{', '.join(MODELS)}; {', '.join(TARGETS)}. Received: "
            f"{', '.join(sorted(unknown))}"
        )
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CELL",
        help="MODEL, :TARGET or MODEL:TARGET, done anew; otherwise what is "
        "not in results.json yet",
    )
    parser.add_argument("--again", action="store_true", help="all of it anew")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=300, help="seconds")
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "build" / "export_table"
    )
    parser.add_argument(
        "--page", type=pathlib.Path, default=PAGE, help="%(default)s"
    )
    for step in ("--write", "--run"):
        parser.add_argument(step, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    step = arguments.write or arguments.run
    if step:
        action = write if arguments.write else run
        name, what = step
        try:
            result = action(name, what, out / name) or {}
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # Runtimes that crash at the end have done their work.

    out.mkdir(parents=True, exist_ok=True)
    table = Table(out, arguments.timeout)
    if arguments.again:
        table.results = {}
        for model in MODELS:
            shutil.rmtree(out / model, ignore_errors=True)
    chosen = choose(arguments.only, table.results)
    table.reasons = install(out)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(table.fill, *cell) for cell in chosen]:
            done.result()
    text = table.render()
    print(f"\n{text}")
    page = arguments.page.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    arguments.page.write_text(
        f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"
    )


if __name__ == "__main__":
    main()
