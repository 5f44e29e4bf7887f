# SPDX-License-Identifier: Apache-2.0
"""Runs files in the runtimes of `export_table.py`, and compares outputs."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from export_models import FILES, ROOT, Cases

# Rounding in float32 never makes a difference as large as this.
WRONG = 1e-2

# Takes inputs by name; returns outputs by name.
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def load_tensorflow(path: str, native: bool) -> Run:
    import tensorflow as tf

    if native:
        minor = ".".join(tf.__version__.split(".")[:2])
        tf.load_op_library(str(ROOT / "tf_deform" / f"_ops_{minor}.so"))
    loaded = tf.saved_model.load(path)
    signatures = loaded.signatures
    # Keras' signature has one input, of any name.
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
    # Without this option OpenVINO computes in bfloat16 where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(path, "CPU", options)
    # Keras' export may list tensors that are left over inside beside the
    # outputs, which have names like this.
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
    """Runs a file in Node.js; returns outputs and the script's notes."""
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
    """Runs a file in a runtime, and compares its outputs."""
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
            # A SavedModel is recognised by its folder.
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
    """Runs with the wasm backend; if that fails, in plain JavaScript."""
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
    """Returns the largest difference of any output."""
    if len(expected) != len(received):
        raise ValueError(
            f"Expected {len(expected)} outputs. Received: {len(received)}"
        )
    if expected.keys() != received.keys():
        # Pairs outputs in their order if their names differ.
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


def find_format(target: str) -> str:
    """Returns the format that a target runs."""
    for ending in ("-node", "-web", "-openvino"):
        if not target.startswith("keras"):
            target = target.removesuffix(ending)
    return target
