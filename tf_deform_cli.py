# SPDX-License-Identifier: Apache-2.0
"""Runs the command `tf-deform`: trains models, finds and checks libraries.

    tf-deform train detect|segment
    tf-deform eval
    tf-deform show
    tf-deform export
    tf-deform demo
    tf-deform library
    tf-deform doctor

This module stands beside the package and imports nothing of it, as `import
tf_deform` loads TensorFlow: it loads single files of the package by their
paths. So help, the version and mistakes on the command line are answered at
once, and `doctor` also answers where TensorFlow is missing or crashes. `python
-m tf_deform` runs the same `main`.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

_DISTRIBUTION = "tf-deform"
_REBUILD = (
    "Run `pip install tf-deform` or, in the project's folder, `pip install .`"
)
_TIMEOUT = 600  # seconds; TensorFlow on a cold network disk takes minutes
_KERAS = "keras >=3.5, tf_keras, or keras 2.15 of TensorFlow 2.15"
# Begins the child's lines that are for the parent: libraries print, too.
_MARK = "tf-deform doctor: "
_TOLD = (
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_LIBRARY_HELP = (
    "Prints the path of tf_deform's op library for the TensorFlow that is "
    "installed here. With it, a program that does not import tf_deform runs "
    "SavedModels that were exported with native ops: tf.load_op_library(path) "
    "in Python, TF_LoadLibrary(path, status) of TensorFlow's C API, before the "
    "model is loaded. The op library loads the core, which it finds in its own "
    "folder: who copies one copies both."
)
_DOCTOR_HELP = (
    "Imports TensorFlow, Keras and tf_deform step by step in a process of its "
    "own, computes with the ops, and prints what it found and expected. The "
    "exit status is 0 only if the native ops work."
)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, and where to read more in another."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2; commands get it, too."""
        text = f"{self.prog}: error: {message}\nSee `{self.prog} --help`\n"
        self.exit(2, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program's name; None means the
            command line of the process.

    Returns:
        The exit status: 0, 1 if the command failed, or 2 if there is no
            command.

    Raises:
        SystemExit: After `--help` and `--version` (0), or after wrong arguments
            (2).
    """
    parser = _Parser(
        prog="tf-deform",
        description="Deformable convolution and ROI pooling for TensorFlow "
        "and Keras.",
    )
    parser.add_argument(
        "--version", action="version", version=f"tf-deform {_version()}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    settings, line = _part("_settings"), _part("_command_line")
    if settings and line:
        line.add_commands(commands, settings)
    library = commands.add_parser(
        "library",
        help="print the path of the op library",
        description=_LIBRARY_HELP,
    )
    library.add_argument(
        "--core", action="store_true", help="print the core's path instead"
    )
    commands.add_parser(
        "doctor",
        help="tell whether the ops work, and why not",
        description=_DOCTOR_HELP,
    )
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        asked = parsed.parser if "parser" in parsed else parser
        asked.error(_tell_unknown(unknown, asked))
    if "task" in parsed:
        found = line.find_settings(parsed, settings, _part("_run_folder"))
        return _run_task(parsed.task, found, parsed.quiet)
    if parsed.command == "library":
        return _print_library(_core if parsed.core else _op_library)
    if parsed.command == "doctor":
        return _print_diagnosis()
    # Prints to standard error: a script reads a path from standard output.
    parser.print_help(sys.stderr)
    return 2


def _tell_unknown(
    unknown: Sequence[str], parser: argparse.ArgumentParser
) -> str:
    """Says what a parser does not know, and what is spelled like it."""
    options = [
        name for action in parser._actions for name in action.option_strings
    ]
    similar = [
        name
        for text in unknown
        if text.startswith("--")
        for name in difflib.get_close_matches(text.split("=")[0], options, 1)
    ]
    meant = f". Did you mean {', '.join(similar)}?" if similar else ""
    return f"unrecognized arguments: {' '.join(unknown)}{meant}"


def _run_task(task: str, found: Mapping[str, Any], quiet: bool) -> int:
    """Runs a function of `tf_deform.tasks`; its messages go to standard error.

    An error of a kind that says what was expected is told without a traceback,
    which a run has in its `log.txt`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logger = logging.getLogger("tf_deform")
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    # Libraries that convert models let the root logger print everything, too.
    logger.propagate = False
    try:
        from tf_deform import tasks

        with tasks.progress(not quiet):
            result = getattr(tasks, task)(**found)
        if task == "evaluate":
            from tf_deform.training._metrics import plain

            print(json.dumps(plain(result), indent=2))
        return 0
    except KeyboardInterrupt as interrupt:
        # A run says how to go on.
        logger.error("%s", str(interrupt) or "Interrupted")
    except _TOLD as error:
        logger.error("%s", error)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
    return 1


# The functions below find facts without an import of the package.


def _package() -> str:
    """Returns the folder of the package that `import tf_deform` would take."""
    spec = importlib.util.find_spec("tf_deform")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "Expected the package tf_deform beside its command. Received: no "
            f"such package. {_REBUILD}"
        )
    return list(spec.submodule_search_locations)[0]


def _part(name: str) -> ModuleType | None:
    """Loads a file of the package by its path; returns None if there is none.

    The file imports nothing of the package.
    """
    path = os.path.join(_package(), f"{name}.py")
    if not os.path.exists(path):
        return None
    spec = importlib.util.spec_from_file_location(f"_tf_deform{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_info() -> ModuleType | None:
    """Returns the module that the build has written, or None."""
    return _part("_build_info")


def _version() -> str:
    """Returns the version of the package, also of a source tree."""
    info = _build_info()
    if info is not None:
        return info.VERSION
    setup = os.path.join(os.path.dirname(_package()), "setup.py")
    if os.path.exists(setup):
        with open(setup, encoding="utf-8") as file:
            found = re.search(r'^VERSION = "(.+)"$', file.read(), re.MULTILINE)
        if found:
            return f"{found[1]} (a source tree without built ops)"
    return "unknown (a package without built ops)"


def _installed(field: str) -> list[str]:
    """Returns a field of the installed distribution's metadata, if any."""
    try:
        metadata = importlib.metadata.metadata(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return []
    return metadata.get_all(field) or []


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _tensorflow() -> str:
    """Returns the version of the installed TensorFlow, imported if need be.

    Raises:
        ImportError: There is no TensorFlow, or it cannot be imported.
    """
    spec = importlib.util.find_spec("tensorflow")
    if spec is not None and spec.origin is not None:
        # The distribution may be tensorflow-cpu, tf-nightly or another one.
        folder = os.path.dirname(os.path.dirname(spec.origin))
        versions = {
            distribution.version
            for distribution in importlib.metadata.distributions(path=[folder])
            if re.search(
                r"^tensorflow/__init__\.py,",
                distribution.read_text("RECORD") or "",
                re.MULTILINE,
            )
        }
        if len(versions) == 1:
            return versions.pop()
    code = "import tensorflow; _tell('version', finding=tensorflow.__version__)"
    results, end = _run_child(code)
    if "version" not in results:
        raise ImportError(
            f"Expected TensorFlow {', '.join(_libraries())}, for which there "
            f"are op libraries in {_package()}. Received: {end}"
        )
    return results["version"]["finding"]


def _libraries() -> dict[str, str]:
    """Returns the paths of the op libraries by TensorFlow's minor version."""
    info = _build_info()
    paths = {
        minor: os.path.join(_package(), f"_ops_{minor}.so")
        for minor in (info.LIBRARIES if info else ())
    }
    return {
        minor: path for minor, path in paths.items() if os.path.exists(path)
    }


def _op_library() -> str:
    """Returns the path of the op library for the installed TensorFlow.

    Raises:
        FileNotFoundError: The package does not have it.
        ImportError: There is no TensorFlow.
    """
    libraries = _libraries()
    if not libraries:
        raise FileNotFoundError(
            f"Expected op libraries of tf_deform in {_package()}. Received: "
            f"none. {_REBUILD}"
        )
    version = _tensorflow()
    path = libraries.get(_minor(version))
    if path is None:
        raise FileNotFoundError(
            f"Expected TensorFlow {', '.join(libraries)}, for which there are "
            f"op libraries in {_package()}. Received: TensorFlow {version}."
        )
    return path


def _core() -> str:
    """Returns the path of the core.

    Raises:
        FileNotFoundError: The package does not have it.
    """
    info = _build_info()
    path = os.path.join(_package(), info.CORE if info else "the core")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"Expected the core library of tf_deform at {path}. Received: no "
            f"such file. {_REBUILD}"
        )
    return path


def _print_library(find: Callable[[], str]) -> int:
    try:
        print(find())
    except (FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# The functions below are the steps of `doctor`. They run in this order in a
# child process; each returns a finding, or raises an error that says why the
# ops do not work.


def _check_core() -> str:
    """Asks the core, which needs no TensorFlow, for its instruction set."""
    core = ctypes.CDLL(_core())
    core.TfDeformInstructionSet.restype = ctypes.c_char_p
    limit = os.environ.get("TF_DEFORM_MAX_ISA")
    return core.TfDeformInstructionSet().decode() + (
        f", limited by TF_DEFORM_MAX_ISA={limit}" if limit else ""
    )


def _check_gpu() -> str:
    info = _build_info()
    if info is None or info.CUDA_VERSION is None:
        return "none: the package was built without nvcc"
    kernels = (
        f"built with CUDA {info.CUDA_VERSION} for compute capability "
        f"{info.CUDA_ARCHITECTURES.replace(';', ', ')}"
    )
    message = ctypes.create_string_buffer(512)
    core = ctypes.CDLL(_core())
    if core.TfDeformCudaCheckDriver(message, ctypes.c_int64(len(message))):
        return f"{kernels}; they do not run here: {message.value.decode()}"
    return f"{kernels}; the driver and the GPU run them"


def _check_tensorflow() -> str:
    import tensorflow as tf

    gpus = len(tf.config.list_physical_devices("GPU"))
    libraries = ", ".join(_libraries()) or "none"
    return f"{tf.__version__}; op libraries for {libraries}; sees {gpus} GPUs"


def _check_keras() -> str:
    """Tells which Keras is `tf.keras`, which is the one of the layers."""
    import tensorflow as tf

    package = tf.keras.Model.__module__.partition(".")[0]
    return (
        f"{package} {importlib.import_module(package).__version__}, expected "
        f"{_KERAS}; backend {tf.keras.backend.backend()}"
    )


def _check_import() -> str:
    import tf_deform

    return f"{tf_deform.__version__} in {os.path.dirname(tf_deform.__file__)}"


def _check_ops() -> str:
    import tensorflow as tf

    from tf_deform import _loader

    if _loader.op_library() is None:
        _op_library()
        raise ImportError(
            "Expected native ops. Received: the environment variable "
            f"{_loader.VARIABLE}={os.environ[_loader.VARIABLE]}"
        )
    _compute(tf.function(autograph=False))
    return "loaded; results and gradients are right"


def _check_xla() -> str:
    import tensorflow as tf

    from tf_deform import _loader

    if not _loader.has_xla():
        return f"none: TensorFlow {tf.__version__} has no interface for it"
    if not _loader.supports_jit():
        return "not on this GPU: the package was built without nvcc"
    _compute(tf.function(autograph=False, jit_compile=True))
    return "the ops compile; results and gradients are right"


def _compute(wrap: Callable[[Callable], Callable]) -> None:
    """Convolves 0, 1, 2, ... with one tap that reads half a pixel lower.

    Raises:
        ArithmeticError: The outputs or the gradients differ from the exact
            results of the equation, away from the last row and column.
    """
    import tensorflow as tf

    from tf_deform import ops

    inputs = tf.reshape(tf.range(12.0), (1, 4, 3, 1))
    offset = tf.tile([[[[0.5, 0.0]]]], (1, 4, 3, 1))

    @wrap
    def run(offset: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(offset)
            outputs = ops.deformable_conv2d(
                inputs, tf.ones((1, 1, 1, 1)), offset
            )
        return outputs, tape.gradient(outputs, offset)

    outputs, gradients = (result[0, :3, :2] for result in run(offset))
    for name, received, expected in (
        ("outputs", outputs[..., 0], inputs[0, :3, :2, 0] + 1.5),
        ("gradients", gradients, tf.tile([[[3.0, 1.0]]], (3, 2, 1))),
    ):
        if not bool(tf.reduce_all(received == expected)):
            raise ArithmeticError(
                f"Expected {name} {expected.numpy().tolist()}. Received: "
                f"{received.numpy().tolist()}"
            )


_STEPS: Mapping[str, Callable[[], str]] = {
    "instruction set": _check_core,
    "GPU kernels": _check_gpu,
    "TensorFlow": _check_tensorflow,
    "Keras": _check_keras,
    "tf_deform": _check_import,
    "ops": _check_ops,
    "XLA": _check_xla,
}


def _run_steps() -> None:
    """Runs the steps, up to an error, and tells the parent before and after."""
    for step, check in _STEPS.items():
        _tell(step)
        try:
            _tell(step, finding=check())
        except Exception as error:
            _tell(step, error=f"{type(error).__name__}: {error}")
            # The core and TensorFlow are independent of each other, so an error
            # of the core does not end the steps.
            if check not in (_check_core, _check_gpu):
                return


def _tell(step: str, **result: str) -> None:
    # Begins a new line, as a library may have left a line unfinished.
    line = f"\n{_MARK}{json.dumps({'step': step, **result})}\n"
    os.write(1, line.encode())


def _run_child(code: str) -> tuple[dict[str, dict[str, str]], str]:
    """Runs code that knows this module's `_tell` and `_run_steps`, in a child.

    Returns:
        The result of every step that began (a "finding", an "error", or neither
        if the child ended within the step), and how the child ended, in words.
    """
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        f"from tf_deform_cli import _run_steps, _tell; {code}"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path)]
    try:
        child = subprocess.run(command, capture_output=True, timeout=_TIMEOUT)
        outputs, errors, status = child.stdout, child.stderr, child.returncode
        end = f"exit status {status}"
        if status < 0:
            end = f"signal {signal.Signals(-status).name}"
    except subprocess.TimeoutExpired as error:
        outputs, errors = error.stdout or b"", error.stderr or b""
        end = f"no answer for {_TIMEOUT} s"
    results: dict[str, dict[str, str]] = {}
    for line in outputs.decode(errors="replace").splitlines():
        if line.startswith(_MARK):
            result = json.loads(line.removeprefix(_MARK))
            results[result.pop("step")] = result
    said = errors.decode(errors="replace").strip().splitlines()[-3:]
    return results, "\n".join([f"the process ended with {end}", *said])


def _extras() -> Iterator[tuple[str, str]]:
    """Yields each extra of the distribution, and its missing requirements."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield "extras", "unknown: the package `packaging` is not installed"
        return
    extras: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, _installed("Requires-Dist")):
        found = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker))
        if found:
            extras.setdefault(found[1], []).append(requirement)
    if not extras:
        yield "extras", "unknown: a source tree that is not installed"
    for extra in extras:
        lacking = list(dict.fromkeys(_lacking(extra, extras)))
        yield (
            f"extra {extra}",
            f"lacks {', '.join(lacking)}" if lacking else "installed",
        )


def _lacking(extra: str, extras: Mapping[str, list[Any]]) -> Iterator[str]:
    """Yields the requirements of an extra that are not met."""
    for requirement in extras[extra]:
        if requirement.name == _DISTRIBUTION:
            for other in sorted(requirement.extras):
                yield from _lacking(other, extras)
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield wanted
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{wanted} (found {found})"


def _print_diagnosis() -> int:
    """Prints the diagnosis; returns 0 if every step has a finding, else 1."""
    _print_line("tf-deform", _version())
    expected = _installed("Requires-Python") or ["unknown"]
    _print_line(
        "Python", f"{platform.python_version()}, expected {expected[0]}"
    )
    results, end = _run_child("_run_steps()")
    failed = []
    for step in _STEPS:
        result = results.get(step)
        if result is None:
            _print_line(step, "not tried")
        elif "finding" in result:
            _print_line(step, result["finding"])
        else:
            _print_line(step, f"FAILED: {result.get('error', end)}")
        if result is None or "finding" not in result:
            failed.append(step)
    for extra, finding in _extras():
        _print_line(extra, finding)
    cache = _part("_cache")
    _print_line("cache", f"{cache.cache_folder()} ({cache.VARIABLE})")
    verdict = "the native ops work"
    if "ops" in failed:
        verdict = "the native ops do not work"
    elif failed:
        verdict += f", but not all else: {', '.join(failed)}"
    _print_line("verdict", verdict)
    return 1 if failed else 0


def _print_line(name: str, finding: str) -> None:
    print(f"{name + ':':17}" + finding.replace("\n", f"\n{'':17}"))


if __name__ == "__main__":
    sys.exit(main())
