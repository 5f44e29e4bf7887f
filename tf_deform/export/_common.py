# SPDX-License-Identifier: Apache-2.0
"""Writes an export's file, and compares it with the model, for all exports."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_deform import _files
from tf_deform.export import _detections
from tf_deform.export._source import Source, find_source

# Maps names to inputs or outputs.
Arrays = dict[str, np.ndarray]
# Enters a step of the export and tells the user about it.
Stage = Callable[[str], contextlib.AbstractContextManager[None]]

# Sizes to try for unknown dimensions: of batches, heights, widths, and of the
# dimensions after them.
_BATCHES, *_SIZES = (2, 3), (64, 96), (96, 64), (5, 6)


@dataclasses.dataclass(frozen=True)
class Report:
    """Describes an exported file, and how it was compared with the model.

    Attributes:
        path: The file or folder.
        size: Its size in bytes.
        differences: For each output, the largest absolute difference between
            the exported model and the model, divided by the output's largest
            magnitude, over all inputs that were tried. For integers, truth
            values and strings, the share of the elements that differ.
        shapes: Shapes of the inputs that were tried.
    """

    path: pathlib.Path
    size: int
    differences: dict[str, float]
    shapes: list[dict[str, tuple[int, ...]]]

    def __str__(self) -> str:
        found = ", ".join(f"{k} {v:.2g}" for k, v in self.differences.items())
        return (
            f"{self.path}: {self.size / 2**20:.1f} MiB, outputs differ from "
            f"the model's, relative to the largest of each, by: {found}"
        )


class Sample(NamedTuple):
    """Holds inputs that were tried, and the model's outputs; both by name."""

    given: Arrays
    expected: Arrays


def run_model(
    source: Source, sample: Any, declared: bool = False
) -> list[Sample]:
    """Runs the model on the user's inputs, or on random ones.

    Random inputs have two sizes where a dimension is unknown. An iterator gives
    several inputs, each of which is tried. `declared` says that the user gave
    the signature; errors then name it.

    Raises:
        ValueError: The inputs do not fit, or the model does not take them.
    """
    specs = source.inputs
    if sample is None:
        rng = np.random.default_rng(0)
        fixed = all(spec.shape.is_fully_defined() for spec in specs)
        tried = [
            [_make_random(spec, variant, rng) for spec in specs]
            for variant in range(1 if fixed else 2)
        ]
    elif isinstance(sample, Iterator):
        tried = [_read_sample(specs, one) for one in sample]
    else:
        tried = [_read_sample(specs, sample)]
    samples = []
    for values in tried:
        given = {spec.name: value for spec, value in zip(specs, values)}
        try:
            expected = source.flat(*map(tf.constant, values))
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            origin = "made up" if sample is None else "given"
            named = "`sample` to hold inputs"
            if declared and sample is None:
                named = "`input_signature` (or `sample`) to be of inputs"
            raise ValueError(
                f"Expected {named} that the model takes. "
                f"Received: {_shapes(given)} ({origin}), for which it raised: "
                f"{error}"
            ) from error
        expected = {name: np.asarray(x) for name, x in expected.items()}
        samples.append(Sample(given, expected))
    return samples


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in arrays.items()}


def _read_sample(
    specs: Sequence[tf.TensorSpec], sample: Any
) -> list[np.ndarray]:
    names = [spec.name for spec in specs]
    if isinstance(sample, Mapping):
        if set(sample) != set(names):
            raise ValueError(
                f"Expected `sample` to have the keys {names}. Received: "
                f"{list(sample)}"
            )
        sample = [sample[name] for name in names]
    elif not isinstance(sample, (list, tuple)):
        sample = [sample]
    if len(sample) != len(specs):
        raise ValueError(
            f"Expected `sample` to hold {len(specs)} arrays, for {names}. "
            f"Received: {len(sample)}"
        )
    return [_cast(value, spec) for value, spec in zip(sample, specs)]


def _cast(value: Any, spec: tf.TensorSpec) -> np.ndarray:
    """Returns the value in the type of an input, if the type can hold it."""
    value = np.asarray(value)
    if spec.dtype == tf.string:
        array, fits = value.astype(object), value.dtype.kind in "OSU"
    else:
        fits = value.dtype.kind in "biuf" or value.dtype == spec.dtype
        array = value.astype(spec.dtype.as_numpy_dtype) if fits else value
        if not spec.dtype.is_floating:
            fits = fits and np.array_equal(array, value)
    if not (fits and spec.shape.is_compatible_with(array.shape)):
        raise ValueError(
            f"Expected `sample` to hold, for {spec.name!r}, an array of shape "
            f"{spec.shape} with values of the type {spec.dtype.name}. "
            f"Received: {value.dtype} {value.shape}"
        )
    return array


def _make_random(
    spec: tf.TensorSpec, variant: int, rng: np.random.Generator
) -> np.ndarray:
    if spec.shape.rank is None or spec.dtype == tf.string:
        raise ValueError(
            "Expected `sample`, as nothing can be made up for an input of "
            f"unknown rank or of strings. Received: {spec}"
        )
    choices = [_BATCHES, *_SIZES][: spec.shape.rank]
    choices += [_SIZES[-1]] * (spec.shape.rank - len(choices))
    shape = [
        choice[variant] if size is None else size
        for size, choice in zip(spec.shape, choices)
    ]
    dtype = spec.dtype
    if dtype.is_floating:
        return rng.random(shape).astype(dtype.as_numpy_dtype)
    if dtype == tf.uint8:
        return rng.integers(0, 256, shape, "uint8")
    return rng.integers(0, 2, shape).astype(dtype.as_numpy_dtype)


def compare(
    samples: Sequence[Sample],
    run: Callable[[Arrays], Mapping[str, Any]],
    path: pathlib.Path,
    tolerance: float,
    least: float | None = None,
) -> dict[str, float]:
    """Compares the exported model with the model.

    Detections are compared with their counterparts, see `_detections.align`.

    Args:
        samples: Inputs, and the model's outputs for them.
        run: Runs the exported model.
        path: Final path of the export, for errors.
        tolerance: Largest difference allowed.
        least: The least score of a detector.

    Returns:
        `Report.differences`.

    Raises:
        RuntimeError: The outputs differ by more, or the exported model does not
            run.
    """
    differences: dict[str, float] = {}
    worst, text = -1.0, ""
    for given, expected in samples:
        try:
            received = run(given)
            received = {name: np.asarray(received[name]) for name in expected}
        except Exception as error:
            raise RuntimeError(
                f"Expected {path} to run with inputs of the shapes "
                f"{_shapes(given)}. Received: {error}. Nothing was written"
            ) from error
        for name, array in expected.items():
            if received[name].shape != array.shape:
                # Neither a tolerance nor other inputs would help.
                raise RuntimeError(
                    f"Expected {path} to give {name!r} the shape "
                    f"{array.shape}, as the model does. Received: "
                    f"{received[name].shape}, for inputs of the shapes "
                    f"{_shapes(given)}. Nothing was written"
                )
        # With a tolerance of 1 any detection may be missing: rows are compared.
        if tolerance < 1 and _detections.are_detections(expected):
            try:
                received = _detections.align(
                    expected, received, tolerance, least
                )
            except _detections.Unlike as unlike:
                raise _explain_difference(path, tolerance, unlike) from None
        for name, array in expected.items():
            found = measure_difference(array, received[name])
            differences[name] = max(found, differences.get(name, 0.0))
            if found > worst:
                worst, text = found, describe_difference(array, received[name])
                text += f" in {name!r}"
    if not worst <= tolerance:
        raise _explain_difference(path, tolerance, text)
    return differences


def _explain_difference(
    path: pathlib.Path, tolerance: float, found: Any
) -> RuntimeError:
    return RuntimeError(
        f"Expected {path} to give what the model gives, to {tolerance:g} of "
        f"the largest number. Received: {found}. Nothing was written. If "
        "made-up inputs are the reason, pass `sample`, or `tolerance`"
    )


def export(
    model: Any,
    path: str | os.PathLike,
    write: Callable[[Source, pathlib.Path, Stage], None],
    load: Callable[
        [Source, pathlib.Path], Callable[[Arrays], Mapping[str, Any]]
    ],
    *,
    folder: bool = False,
    in_tensorflow: bool = False,
    input_signature: Sequence[tf.TensorSpec] | None,
    sample: Any,
    tolerance: float | None,
    verbose: bool,
) -> Report:
    """Checks, writes and compares, for all public functions of this package.

    Args:
        write: Writes the model to a path.
        load: Takes that path; returns a function that runs the exported model.
        folder: Whether `write` writes a folder, not a file.
        in_tensorflow: Whether TensorFlow will run the exported model as it runs
            the model: on the same device, and with mixed precision.
    """
    if tolerance is not None and not isinstance(tolerance, (int, float)):
        raise TypeError(
            f"Expected `tolerance` to be a number. Received: {tolerance!r}"
        )
    # Resolves links and relative paths, so that a later chdir cannot move the
    # target.
    path = pathlib.Path(os.path.realpath(_files.to_path(path)))
    source = find_source(model, input_signature)
    stage = functools.partial(_stage, verbose=verbose)
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(
            _files.writing(path, "saved_model.pb" if folder else None)
        )
        if not in_tensorflow:
            stack.enter_context(source.in_float32())
        if tolerance is None:
            tolerance = source.tolerance()
        # A GPU may round products to TF32.
        device = None if in_tensorflow else "/CPU:0"
        with stage("Running the model"), tf.device(device):
            samples = run_model(source, sample, input_signature is not None)
        with _explaining_full_disk(path):
            write(source, partial, stage)
        with stage(f"Running {path.name} and comparing"):
            try:
                run = load(source, partial)
            except Exception as error:
                raise RuntimeError(
                    f"Expected {path} to be loaded by its runtime. Received: "
                    f"{error}. Nothing was written"
                ) from error
            differences = compare(
                samples, run, path, tolerance, source.least_score()
            )
        size = _measure_size(partial)
    shapes = [_shapes(given) for given, _ in samples]
    report = Report(path, size, differences, shapes)
    if verbose:
        print(report, flush=True)
    return report


@contextlib.contextmanager
def _explaining_full_disk(path: pathlib.Path) -> Iterator[None]:
    """Raises one error for a full disk, whichever library writes; names `path`.

    TensorFlow raises another error, which names the staging folder.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = os.strerror(errno.ENOSPC)
        if reason not in str(error):
            raise
        text = (
            f"Expected `path` to have space for the model. Received: {reason}"
        )
        raise OSError(errno.ENOSPC, text, str(path)) from error


def measure_difference(expected: np.ndarray, received: Any) -> float:
    """Returns the largest difference over the largest number; inf if unlike.

    For integers, truth values and strings, it returns the share of the elements
    that differ.
    """
    received = np.asarray(received)
    if expected.shape != received.shape:
        return np.inf
    if expected.dtype.kind in "OSU":  # One array may hold bytes, one text.
        pairs = zip(expected.flat, received.flat)
        different = [
            tf.compat.as_str(a) != tf.compat.as_str(b) for a, b in pairs
        ]
        return float(np.mean(different or [False]))
    if expected.dtype.kind in "biu":
        return float(np.mean(expected != received)) if expected.size else 0.0
    expected, received = (x.astype("float64") for x in (expected, received))
    same = (expected == received) | (np.isnan(expected) & np.isnan(received))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        delta = np.where(same, 0, np.abs(expected - received))
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        ratio = delta.max() / largest
    return float(ratio) if np.isfinite(delta).all() else np.inf


def _measure_size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe_difference(expected: np.ndarray, received: Any) -> str:
    """Returns `measure_difference`, in words where it is no number."""
    received = np.asarray(received)
    difference = measure_difference(expected, received)
    if np.isfinite(difference):
        return f"a difference of {difference:.2g}"
    if expected.shape != received.shape:
        return f"the shape {received.shape} in place of {expected.shape}"
    expected, received = (x.astype("float64") for x in (expected, received))
    for name, judge in (
        ("NaN", np.isnan),
        ("infinity", np.isposinf),
        ("-infinity", np.isneginf),
    ):
        more = judge(received) & ~judge(expected)
        less = judge(expected) & ~judge(received)
        if more.any() or less.any():
            return (
                f"{name} at {more.sum()} of {more.size} places where the model "
                f"has none, and none at {less.sum()} places where it has it,"
            )
    return f"up to {np.abs(received).max():.2g} where all should be 0,"


@contextlib.contextmanager
def _stage(text: str, verbose: bool) -> Iterator[None]:
    """Tells which step is being done, and how long it took."""
    if verbose:
        print(f"{text} ... ", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        if verbose:
            print("failed", flush=True)
        raise
    if verbose:
        print(f"{time.perf_counter() - start:.1f} s", flush=True)


def require(extra: str, *modules: str) -> list[Any]:
    """Imports optional packages.

    Raises:
        ImportError: A package is missing; the error names the extra that brings
            it.
    """
    found = []
    for module in modules:
        try:
            found.append(importlib.import_module(module))
        except ImportError as error:
            raise ImportError(
                f"Expected the package {module.split('.')[0]!r} for this "
                f"export. Received: {error}. Run `pip install "
                f"'tf-deform[{extra}]'`"
            ) from error
    return found
