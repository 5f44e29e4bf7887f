# SPDX-License-Identifier: Apache-2.0
"""Every kind of model in every format and runtime: the table of docs/export.md.

    pip install 'tf-deform[benchmark,examples,litert]'
    python benchmarks/export_table.py
    python benchmarks/export_table.py --only detector:onnx22-web resnet
    python benchmarks/export_table.py --only :tfjs --models

Each file is written in a process of its own, and run in another process in
which tf_deform is not installed. A crash or a hang is the result of one cell
only. The numbers are the largest difference from the model's output here,
relative to the largest number of an output; for integers the share of elements
that differ. Branches are random: samples move by one to two pixels.

Some runtimes need Node.js (20 or newer) and npm. The first call needs network:
it installs these runtimes and tensorflow.js' converter to the folder of
`--out`. An existing file or result is not made again, unless `--again` or a
newer version of the file requires it.
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
from collections.abc import Mapping, Sequence
from typing import Any

import report
from export_models import FILES, MODELS, ROOT, write
from export_runtimes import find_format, run
from processes import start

HERE = pathlib.Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "export.md"
MARKS = "<!-- the table begins -->", "<!-- the table ends -->"

# Maps a target to its row's first cells, the format, the runtime.
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
# tensorflow.js' converter needs these versions: it cannot import newer
# packages.
CONVERTER = (
    "tensorflowjs==4.22.0",
    "tensorflow==2.19.0",
    "tensorflow-decision-forests==1.12.0",
    "ydf==0.12.0",
    "setuptools<81",
)
# One step of the converter takes any term that is added to a product or a
# convolution for a bias, whatever its shape, and the wasm backend refuses such
# a bias. A residual sum of a plain ResNet is also affected. So the converter
# runs without that step.
CONVERT = """
from tensorflowjs.converters import converter, normalize_bias_add
normalize_bias_add.normalize_bias_add_op = lambda graph: graph
converter.pip_main()
"""
# Maps messages of runtimes to words that tell more.
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


def spawn(
    command: Sequence[Any], timeout: float, **arguments: Any
) -> dict[str, Any]:
    """Returns the last line of a process, or the reason of its failure."""
    words = [str(word) for word in command]
    with start(words, stderr=subprocess.PIPE, **arguments) as process:
        try:
            printed, told = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
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
    """Installs missing runtimes; returns reasons where that failed."""
    reasons = {}
    node = out / "node"
    node.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "node").iterdir():
        shutil.copy(file, node / file.name)
    if not (node / "node_modules").exists():
        print("installing runtimes for Node.js", flush=True)
        try:
            # Installs without scripts: one script would download libraries for
            # GPUs.
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
    """Holds the cells that are known so far, and fills in missing cells."""

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
        """Writes a file once, also if several cells need it."""
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
        """Finds the result of one cell."""
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
        report.save(str(self.file), stored)

    def render(self) -> str:
        """Returns the table in Markdown, reasons and versions below it."""
        reasons: list[str] = []

        def cite(reason: str) -> str:
            if reason not in reasons:
                reasons.append(reason)
            return f"[{reasons.index(reason) + 1}]"

        rows = []
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
            rows.append(cells)
        header = ("format", "runs in", *MODELS.values())
        lines = [report.markdown(header, rows, words=2), ""]
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
    """Returns a line of Markdown, without paths of this machine."""
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
    """Returns the cells that `--only` names, or else all unknown cells."""
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
        os._exit(0)  # A runtime that crashes at the end has done its work.

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
    if missing := choose([], table.results):
        # Writing a table of a few cells would empty all other cells.
        print(f"{arguments.page} stays as it is: {len(missing)} cells missing")
        return
    page = arguments.page.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    arguments.page.write_text(
        f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"
    )


if __name__ == "__main__":
    main()
