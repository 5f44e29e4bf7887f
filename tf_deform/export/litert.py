# SPDX-License-Identifier: Apache-2.0
"""Models for LiteRT (TensorFlow Lite), of its builtin operations alone."""

import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _implementation
from tf_deform.export import _common, _source
from tf_deform.export.saved_model import check_portable, write


def litert(
    model: Any,
    path: str | os.PathLike,
    *,
    input_signature: Sequence[tf.TensorSpec] | None = None,
    sample: Any = None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> _common.Report:
    """Writes a model as a LiteRT file, and compares it with the model.

    The file holds builtin operations alone: it runs wherever LiteRT does. Its
    signature "serving_default" takes and returns tensors by name, of any size
    where the model does, and of any batch from 1. Deformable layers become
    gathers and products, which take more time and memory than native ops. A
    Keras model's layers with a mixed policy are exported in float32.

    Args:
        model: A Keras model, or a `tf.function` of tensors.
        path: File to write. One that is there is replaced, at the end and in
            one step.
        input_signature: Shape, type and name of the model's inputs. None: as
            the model says, which a subclassed one does not.
        sample: Values for the inputs, an array, list or dictionary, with which
            the file is compared with the model. None: random ones, from 0 to 1
            or, for uint8, to 255; of two sizes where sizes are unknown.
        tolerance: Largest difference allowed, relative to the largest number
            of an output. None: 1e-3, or .03 for a model in 16 bits.
        verbose: Whether to print what is being done, and the report.

    Returns:
        The report: path, size in bytes, differences by output.

    Raises:
        ImportError: ai-edge-litert is missing: `pip install
            'tf-deform[litert]'`.
        TypeError, ValueError: A model that cannot be exported, or an argument
            that does not fit.
        OSError: `path` cannot be written.
        RuntimeError: What was written differs from the model.
    """
    (interpreter,) = _common.require("litert", "ai_edge_litert.interpreter")

    def load(
        _: _source.Source, file: pathlib.Path
    ) -> Callable[[_common.Arrays], Any]:
        loaded = interpreter.Interpreter(model_path=str(file))
        runner = loaded.get_signature_runner("serving_default")
        return lambda given: runner(**given)

    return _common.export(
        model,
        path,
        _write,
        load,
        input_signature=input_signature,
        sample=sample,
        tolerance=tolerance,
        verbose=verbose,
    )


def _write(
    source: _source.Source, file: pathlib.Path, stage: _common.Stage
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with stage("Tracing"), _implementation.for_other_runtime({}):
            # By way of a SavedModel, of which the converter freezes the
            # variables: of a function it made wrong numbers.
            write(source, pathlib.Path(folder), inline=True)
        check_portable(pathlib.Path(folder))
        with stage("Converting to LiteRT"):
            file.write_bytes(_convert(folder))


def _convert(folder: str) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(
        folder, signature_keys=["serving_default"]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        return converter.convert()
    except Exception as error:
        # The converter's text is pages long and names each operation like
        # this.
        text = str(error)
        names = sorted(set(re.findall(r"'(?:tf|tfl)\.(\w+)' op", text)))
        raise ValueError(
            "Expected a model made of LiteRT's builtin operations. Received: "
            f"{', '.join(names) or text.strip().splitlines()[0]}"
        ) from error
