# SPDX-License-Identifier: Apache-2.0
"""Writes models for LiteRT (TensorFlow Lite), with builtin operations only."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _implementation
from tf_deform.export import _common, _litert_graph, _source
from tf_deform.export.saved_model import check_portable, write

# Largest difference to expect for each kind of quantization, relative to the
# largest number of an output: some pixels lie where samples jump.
_TOLERANCES = {None: None, "float16": 0.25, "dynamic": 0.5, "int8": 0.5}
# Calibration needs at least this many images to show the ranges of activations.
MIN_IMAGES = 32


def litert(
    model: Any,
    path: str | os.PathLike,
    quantize: str | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    input_signature: Sequence[tf.TensorSpec] | None = None,
    sample: Any = None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> _common.Report:
    """Writes a model as a LiteRT file, and compares it with the model.

    The file holds builtin operations alone: it runs wherever LiteRT does. Its
    signature "serving_default" takes and returns tensors by name. Their sizes
    may vary where the model's may, and the batch is any number from 1.
    Deformable layers become gathers and products, which take more time and
    memory than native ops. A Keras model's layers with a policy in 16 bits or
    float64 are exported in float32.

    Quantized files are smaller. Positions in 8 bits would be off by pixels, and
    positions beyond 128 pixels do not run at all. So only convolutions and
    products with weights become int8, and no operation that decides where
    another operation reads, as the branches of deformable layers do. Inputs and
    outputs keep their types.

    Args:
        model: A Keras model, or a `tf.function` of tensors.
        path: File to write. An existing file is replaced, at the end and in one
            step.
        quantize: None: float32. "float16": weights in 16 bits, which become
            float32 when the file is loaded. "dynamic": weights in 8 bits, and
            activations in 8 bits with ranges found at run time. "int8": weights
            and activations in 8 bits, with ranges found by `calibration`.
        calibration: For "int8": batches of inputs like the inputs that the
            model will see, each an array, list or dictionary as `sample` is.
            They are read one by one, and once. None: `sample`, if it has at
            least 32 images.
        input_signature: Shape, type and name of the model's inputs. None: the
            model's own inputs; a subclassed model does not declare them.
        sample: Values for the inputs, an array, list or dictionary, or an
            iterator of several such, with which the file is compared with the
            model. None: the first batch of `calibration`, or else random
            values, from 0 to 1 or, for uint8, to 255; of two sizes where sizes
            are unknown.
        tolerance: Largest difference allowed, relative to the largest number
            of an output. None: 1e-3; .25 for "float16", .5 for "dynamic" and
            "int8", as single pixels may lie where samples jump. Detections are
            compared with their counterparts, whatever their order.
        verbose: Whether to print each step, and the report.

    Returns:
        The report: path, size in bytes, differences by output.

    Raises:
        ImportError: ai-edge-litert is missing: `pip install
            'tf-deform[litert]'`.
        TypeError, ValueError: The model cannot be exported, or an argument does
            not fit.
        OSError: `path` cannot be written.
        RuntimeError: The exported model differs from the model.
    """
    if quantize not in tuple(_TOLERANCES):
        raise ValueError(
            'Expected `quantize` to be None, "float16", "dynamic" or "int8". '
            f"Received: {quantize!r}"
        )
    (interpreter,) = _common.require("litert", "ai_edge_litert.interpreter")
    if quantize in ("dynamic", "int8"):
        _common.require("litert", "ai_edge_quantizer")
    source = _source.find_source(model, input_signature)
    batches = None
    if calibration is not None:
        batches = _read_batches(source.inputs, calibration)
        # Reads the first batch here, so that its error comes before any other
        # work.
        first = next(batches, None)
        if first is None:
            raise ValueError(
                "Expected `calibration` to have at least one batch. Received: "
                "none"
            )
        batches = itertools.chain([first], batches)
        sample = first if sample is None else sample
    elif quantize == "int8":
        batches = _read_sample(source.inputs, sample)
    if tolerance is None:
        tolerance = _TOLERANCES[quantize]

    def load(
        _: _source.Source, file: pathlib.Path
    ) -> Callable[[_common.Arrays], Any]:
        loaded = interpreter.Interpreter(model_path=str(file))
        runner = loaded.get_signature_runner("serving_default")
        return lambda given: runner(**given)

    return _common.export(
        model,
        path,
        functools.partial(_write, quantize=quantize, batches=batches),
        load,
        input_signature=input_signature,
        sample=sample,
        tolerance=tolerance,
        verbose=verbose,
    )


def _read_batches(
    specs: Sequence[tf.TensorSpec], calibration: Any
) -> Iterator[_common.Arrays]:
    """Yields the batches by name, one by one.

    Raises:
        TypeError: `calibration` is not an iterable of batches.
        ValueError: A batch does not fit.
    """
    whole = isinstance(calibration, (str, bytes, Mapping)) or hasattr(
        calibration, "shape"
    )
    if whole or not isinstance(calibration, Iterable):
        shape = getattr(calibration, "shape", None)
        found = type(calibration).__name__
        if shape is not None:
            found += f" of shape {tuple(shape)}"
        raise TypeError(
            "Expected `calibration` to be an iterable of batches, such as "
            f"[images[:16], images[16:]]. Received: {found}"
        )

    def read() -> Iterator[_common.Arrays]:
        for batch in calibration:
            if not isinstance(batch, (Mapping, list, tuple)):
                batch = [batch]
            yield _read_batch(specs, batch, "calibration")

    return read()


def _read_batch(
    specs: Sequence[tf.TensorSpec], batch: Any, argument: str
) -> _common.Arrays:
    try:
        values = _common._read_sample(specs, batch)
    except ValueError as error:
        text = str(error).replace("`sample`", f"batches in `{argument}`")
        raise ValueError(text) from None
    for spec, value in zip(specs, values):
        if value.size == 0 or (
            spec.dtype.is_floating
            and not np.isfinite(value.astype("float32")).all()
        ):
            raise ValueError(
                f"Expected `{argument}` to hold finite numbers, and not none. "
                f"Received: {value.dtype} {value.shape} for {spec.name!r}"
                f"{', with others' if value.size else ''}"
            )
    return {spec.name: value for spec, value in zip(specs, values)}


def _read_sample(
    specs: Sequence[tf.TensorSpec], sample: Any
) -> Iterator[_common.Arrays]:
    """Returns `sample` as the only batch.

    Raises:
        ValueError: `sample` has too few images.
    """
    found = "neither"
    if sample is not None:
        batch = _read_batch(specs, sample, "sample")
        images = len(np.atleast_1d(next(iter(batch.values()))))
        if images >= MIN_IMAGES:
            return iter([batch])
        found = f"a sample of {images} images"
    raise ValueError(
        'Expected `calibration` for quantize="int8", batches of inputs like '
        f"those that the model will see, or a `sample` of {MIN_IMAGES} or more "
        f"images. Received: {found}"
    )


def _write(
    source: _source.Source,
    file: pathlib.Path,
    stage: _common.Stage,
    *,
    quantize: str | None,
    batches: Iterator[_common.Arrays] | None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with stage("Tracing"), _implementation.for_other_runtime({}):
            # Converts by way of a SavedModel, as the converter freezes a
            # SavedModel's variables: from a function it made wrong numbers.
            write(source, pathlib.Path(folder), inline=True)
        check_portable(pathlib.Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=["serving_default"]
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if quantize == "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        with stage("Converting to LiteRT"):
            content = _convert(converter)
        if quantize in ("dynamic", "int8"):
            with stage("Quantizing"):
                content = _quantize(content, quantize, batches)
        file.write_bytes(content)


def _convert(converter: Any) -> bytes:
    try:
        return converter.convert()
    except Exception as error:
        # The converter's text is pages long. It names each operation in this
        # form, and then again with the types of the operands.
        text = str(error)
        names = sorted(set(re.findall(r"'(?:tf|tfl)\.(\w+)' op", text)))
        found = ", ".join(names) or text.strip().splitlines()[0]
        types = {
            _TYPES[short]
            for line in re.findall(r"^\s*(?:tf|tfl)\.\w+\(.*", text, re.M)
            for short in re.findall(r"[<x](bf16|f16|f64)>", line)
        }
        if types:
            found += f" in {', '.join(sorted(types))}"
        if not types and _NEEDS_CHANNELS & set(names):
            found += (
                ", of which the converter does not know the channels. Give "
                "sizes in `input_signature` or in keras.Input, or replace "
                "Keras' UpSampling2D, which hides them where sizes are "
                "unknown, with tf.image.resize"
            )
        raise ValueError(
            "Expected a model made of LiteRT's builtin operations"
            f"{', which compute in float32' if types else ''}. Received: "
            f"{found}"
        ) from error


# LiteRT has these operations, unless the number of channels is unknown.
_NEEDS_CHANNELS = {"Conv2D", "DepthwiseConv2dNative"}
_TYPES = {"bf16": "bfloat16", "f16": "float16", "f64": "float64"}


def _quantize(
    content: bytes, kind: str, batches: Iterator[_common.Arrays] | None
) -> bytes:
    """Returns a file with int8 weights and activations, where that is safe.

    Args:
        content: The file in float32.
        kind: "dynamic" or "int8".
        batches: See `litert`.
    """
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager
    from ai_edge_quantizer.qtyping import QuantGranularity
    from ai_edge_quantizer.utils import qsv_utils

    found = _litert_graph.find_quantizable(content)
    if not found.kinds:
        raise ValueError(
            "Expected a model with a convolution or a product with weights. "
            "Received: one without"
        )
    recipe = recipe_manager.RecipeManager()
    for name in found.kinds:
        if kind == "int8":
            # LiteRT takes one range for a whole stack of matrices.
            granularity = (
                QuantGranularity.TENSORWISE
                if name == "BATCH_MATMUL"
                else QuantGranularity.CHANNELWISE
            )
            recipe.add_static_config(".*", name, 8, 8, granularity)
        else:
            recipe.add_dynamic_config(".*", name, 8)
        # Later entries of the recipe win over earlier ones.
        if found.places:
            recipe.add_weight_only_config(_one_of(found.places), name, 8)
        if found.products:
            recipe.add_quantization_config(
                _one_of(found.products), name, algorithm_key="no_quantize"
            )
    ranges = None
    if recipe.need_calibration():
        first = next(batches)
        shapes = {name: value.shape for name, value in first.items()}
        content = _litert_graph.set_sizes(content, shapes)
        # This mode copies no tensors: deformable layers have many tensors.
        calibration = calibrator.Calibrator(
            content,
            os.cpu_count() or 1,
            calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED,
            qsv_utils.min_max_update,
        )
        for batch in itertools.chain([first], batches):
            with _quiet():
                calibration.calibrate({"serving_default": [batch]}, recipe)
        ranges = calibration.get_model_qsvs()
    with _quiet():
        result = quantizer.Quantizer(
            content, recipe.get_quantization_recipe()
        ).quantize(ranges, enable_progress_report=False)
    return bytes(result.quantized_model)


def _one_of(names: Sequence[str]) -> str:
    """Returns a regular expression for operations with these outputs alone."""
    return f"^(?:{'|'.join(map(re.escape, names))});$"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the quantizer's bars and warnings from the user."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
