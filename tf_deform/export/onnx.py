# SPDX-License-Identifier: Apache-2.0
"""Writes models as ONNX files, with the standard's deformable convolution."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _implementation, _loader
from tf_deform._portable.deformable_conv2d import deformable_conv2d
from tf_deform.export import (
    _common,
    _onnx_graph,
    _onnx_handlers,
    _source,
)

# The first version of the standard with DeformConv, and the last version
# tested.
MIN_OPSET, MAX_OPSET = 19, 22
_NAME = "tf_deform_deformable_conv2d"


def onnx(
    model: Any,
    path: str | os.PathLike,
    opset: int = MIN_OPSET,
    *,
    input_signature: Sequence[tf.TensorSpec] | None = None,
    sample: Any = None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> _common.Report:
    """Writes a model as an ONNX file, and compares it with the model.

    A deformable convolution becomes the standard's `DeformConv`. A convolution
    with `boundary="clamp"`, and the pooling of regions, are not in the standard
    and are made of its other operators. Inputs and outputs keep TensorFlow's
    layout, channels last, and their names; batch and sizes may vary where the
    model's may. onnxruntime runs the file as it is. OpenVINO needs the
    extension in `examples/openvino_extension.py`, and rounds unless its option
    `INFERENCE_PRECISION_HINT` is "f32". A Keras model's layers with a mixed
    policy are exported in float32.

    Args:
        model: A Keras model, or a `tf.function` of tensors.
        path: File to write. An existing file is replaced, at the end and in one
            step.
        opset: Version of the standard, 19 to 22.
        input_signature: Shape, type and name of the model's inputs, such as
            uint8 images for a model of float images. None: the model's own
            inputs; a subclassed model does not declare them.
        sample: Values for the inputs, an array, list or dictionary, or an
            iterator of several such, with which the file is compared with
            the model. None: random values, from 0 to 1 or, for uint8, to 255;
            of two sizes where sizes are unknown.
        tolerance: Largest difference allowed, relative to the largest number
            of an output. None: 1e-3, or .03 for a model in 16 bits. Detections
            are compared with their counterparts, whatever their order.
        verbose: Whether to print each step, and the report.

    Returns:
        The report: path, size in bytes, differences by output.

    Raises:
        ImportError: onnx, onnxruntime or tf2onnx is missing: `pip install
            'tf-deform[onnx]'`.
        TypeError, ValueError: The model cannot be exported, or an argument does
            not fit.
        OSError: `path` cannot be written.
        RuntimeError: The exported model differs from the model; or there are no
            native ops, without which a model cannot be traced for ONNX.
    """
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(
            f"Expected `opset` to be from {MIN_OPSET}, the first with "
            f"DeformConv, to {MAX_OPSET}. Received: {opset!r}"
        )
    _implementation.require_native_ops()
    runtime, standard, _ = _common.require(
        "onnx", "onnxruntime", "onnx", "tf2onnx"
    )

    def write(
        source: _source.Source, file: pathlib.Path, stage: _common.Stage
    ) -> None:
        with (
            stage("Tracing"),
            _implementation.for_other_runtime({_NAME: _standard}),
        ):
            function = source.trace(source.flat, inline=True)
        with stage("Converting to ONNX"):
            proto = _onnx_graph.raise_opset(_convert(source, function), opset)
            file.write_bytes(proto.SerializeToString())

    def load(
        _: _source.Source, file: pathlib.Path
    ) -> Callable[[_common.Arrays], Any]:
        try:
            session = runtime.InferenceSession(
                file, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            text = f"{error}{_name_types(standard.load(file))}"
            if "implementation for DeformConv" in text:
                text += (
                    f" (onnxruntime {runtime.__version__} is there; 1.25 is "
                    "the first that runs DeformConv)"
                )
            raise RuntimeError(text) from error
        names = [output.name for output in session.get_outputs()]
        return lambda given: dict(zip(names, session.run(names, given)))

    return _common.export(
        model,
        path,
        write,
        load,
        input_signature=input_signature,
        sample=sample,
        tolerance=tolerance,
        verbose=verbose,
    )


def _standard(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    offset: tf.Tensor,
    mask: Sequence[tf.Tensor],
    **attributes: Any,
) -> tf.Tensor:
    """Calls the native op where DeformConv can express it, or else stock ops.

    DeformConv has the boundary "zeros", and one type for all operands.
    """
    known = kernel.shape.is_fully_defined() and inputs.shape[3] is not None
    if attributes["boundary"] != "zeros" or not known:
        return deformable_conv2d(inputs, kernel, offset, mask, **attributes)
    dtype = inputs.dtype
    # Fixes shapes that TensorFlow's own inference will not find again, such as
    # the shape of an element that a loop takes from a list.
    kernel = tf.ensure_shape(kernel, kernel.shape)
    inputs = tf.ensure_shape(inputs, (None, None, None, inputs.shape[3]))
    inputs, kernel = (tf.cast(x, offset.dtype) for x in (inputs, kernel))
    outputs = getattr(_loader.op_library(), _NAME)(
        inputs, kernel, offset, mask, **attributes
    )
    return tf.cast(outputs, dtype)


def _convert(source: _source.Source, function: Any) -> Any:
    """Returns the model in opset 18, with DeformConv in a domain of its own."""
    import onnx

    concrete = function.get_concrete_function()
    names = {spec.name for spec in source.inputs}
    both = names & set(concrete.structured_outputs)
    if both:
        raise ValueError(
            "Expected outputs with other names than the inputs'. Received: "
            f"{sorted(both)} as both"
        )
    try:
        proto = _onnx_handlers.convert(concrete)
    except _onnx_handlers.Refused:
        raise
    except Exception as error:
        text = str(error)
        if "scan output" in text:
            text = (
                "a loop that writes its results elsewhere than at its own "
                "number, as keras.ops.scan does (use tf.scan, keras.ops.map or "
                f"keras.layers.RNN): {text}"
            )
        raise ValueError(
            f"Expected a model that tf2onnx converts. Received: {text}"
        ) from error
    # tf2onnx leaves operations that it does not know as they are.
    unknown = collections.defaultdict(list)
    for node in _onnx_graph.walk(proto.graph):
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            unknown[node.op_type].append(node.name)
    if unknown:
        if "_SwitchN" in unknown:  # Freezing has split up the Case operation.
            unknown = {"Case": ["tf.switch_case or keras.ops.switch"]}
        found = ", ".join(
            f"{kind} ({', '.join(names[:3])})"
            for kind, names in unknown.items()
        )
        raise ValueError(
            "Expected a model made of operations that ONNX has. Received: "
            f"{found}"
        )
    return proto


def _name_types(proto: Any) -> str:
    """Names a model's types of numbers besides float32, for an error."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto).graph
    tensors = [*inferred.input, *inferred.output, *inferred.value_info]
    found = {x.type.tensor_type.elem_type for x in tensors}
    kinds = onnx.TensorProto
    names = [
        name
        for kind, name in (
            (kinds.FLOAT16, "float16"),
            (kinds.BFLOAT16, "bfloat16"),
            (kinds.DOUBLE, "float64"),
        )
        if kind in found
    ]
    return f", of a model in {' and '.join(names)}" if names else ""
