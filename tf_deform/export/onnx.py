# SPDX-License-Identifier: Apache-2.0
"""Models as ONNX files, with the standard's deformable convolution."""

import collections
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _implementation, _loader
from tf_deform._portable.deformable_conv2d import deformable_conv2d
from tf_deform.export import _common, _openvino, _source

# The first version of the standard with DeformConv, and the last one tried.
MIN_OPSET, MAX_OPSET = 19, 22
# The newest that tf2onnx writes.
_CONVERTER_OPSET = 18
# Where DeformConv is until the model has been raised to a newer opset.
_DOMAIN = "tf_deform"
_OP = _source.NAMESPACE + "DeformableConv2D"
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

    A deformable convolution becomes the standard's `DeformConv`; one with
    `boundary="clamp"`, and the pooling of regions, which the standard does not
    have, are made of its other operators. Inputs and outputs keep TensorFlow's
    layout, channels last, and their names; batch and sizes may be any where
    the model's may. onnxruntime runs the file as it is; OpenVINO needs the
    extension in `examples/openvino_extension.py`. A Keras model's layers with
    a mixed policy are exported in float32.

    Args:
        model: A Keras model, or a `tf.function` of tensors.
        path: File to write. One that is there is replaced, at the end and in
            one step.
        opset: Version of the standard, 19 to 22.
        input_signature: Shape, type and name of the model's inputs, such as
            uint8 images for a model of float ones. None: as the model says,
            which a subclassed one does not.
        sample: Values for the inputs, an array, list or dictionary, with which
            the file is compared with the model. None: random ones, from 0 to 1
            or, for uint8, to 255; of two sizes where sizes are unknown.
        tolerance: Largest difference allowed, relative to the largest number
            of an output. None: 1e-3, or .03 for a model in 16 bits.
        verbose: Whether to print what is being done, and the report.

    Returns:
        The report: path, size in bytes, differences by output.

    Raises:
        ImportError: onnx, onnxruntime or tf2onnx is missing: `pip install
            'tf-deform[onnx]'`.
        TypeError, ValueError: A model that cannot be exported, or an argument
            that does not fit.
        OSError: `path` cannot be written.
        RuntimeError: What was written differs from the model; or there are no
            native ops, without which a model cannot be traced for ONNX.
    """
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(
            f"Expected `opset` to be from {MIN_OPSET}, the first with "
            f"DeformConv, to {MAX_OPSET}. Received: {opset!r}"
        )
    _implementation.require_native_ops()
    runtime, *_ = _common.require("onnx", "onnxruntime", "onnx", "tf2onnx")

    def write(
        source: _source.Source, file: pathlib.Path, stage: _common.Stage
    ) -> None:
        with (
            stage("Tracing"),
            _implementation.for_other_runtime({_NAME: _standard}),
        ):
            function = source.trace(source.flat, inline=True)
        with stage("Converting to ONNX"):
            proto = _raise_opset(_convert(source, function), opset)
            file.write_bytes(proto.SerializeToString())

    def load(
        _: _source.Source, file: pathlib.Path
    ) -> Callable[[_common.Arrays], Any]:
        session = runtime.InferenceSession(
            file, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return lambda given: dict(
            zip(names, session.run(names, given), strict=True)
        )

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
    """The native op as DeformConv can express it, or else stock ops.

    DeformConv has the boundary "zeros", and one type for everything.
    """
    known = kernel.shape.is_fully_defined() and inputs.shape[3] is not None
    if attributes["boundary"] != "zeros" or not known:
        return deformable_conv2d(inputs, kernel, offset, mask, **attributes)
    dtype = inputs.dtype
    inputs, kernel = (tf.cast(x, offset.dtype) for x in (inputs, kernel))
    outputs = getattr(_loader.op_library(), _NAME)(
        inputs, kernel, offset, mask, **attributes
    )
    return tf.cast(outputs, dtype)


def _convert(source: _source.Source, function: Any) -> Any:
    """The model in opset 18, and DeformConv in a domain of its own."""
    import onnx
    import tf2onnx

    concrete = function.get_concrete_function()
    names = {spec.name for spec in source.inputs}
    both = names & set(concrete.structured_outputs)
    if both:
        raise ValueError(
            "Expected outputs with other names than the inputs'. Received: "
            f"{sorted(both)} as both"
        )
    try:
        proto, _ = tf2onnx.convert.from_function(
            function,
            function.input_signature,
            opset=_CONVERTER_OPSET,
            custom_op_handlers={
                _OP: (_convert_node, []),
                "Select": (_convert_where, []),
                "SelectV2": (_convert_where, []),
                "Erfc": (_convert_erfc, []),
            },
            extra_opset=[onnx.helper.make_opsetid(_DOMAIN, 1)],
        )
    except Exception as error:
        raise ValueError(
            f"Expected a model that tf2onnx converts. Received: {error}"
        ) from error
    _keep_constants(proto.graph, concrete)
    # What it does not know it leaves as it is.
    unknown = collections.defaultdict(list)
    for node in _walk(proto.graph):
        if node.op_type.startswith(_source.NAMESPACE):
            raise _source.explain_stale(node.op_type, node.name)
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            unknown[node.op_type].append(node.name)
    if unknown:
        found = ", ".join(
            f"{kind} ({', '.join(names[:3])})"
            for kind, names in unknown.items()
        )
        raise ValueError(
            "Expected a model made of operations that ONNX has. Received: "
            f"{found}"
        )
    return proto


def _keep_constants(graph: Any, concrete: Any) -> None:
    """Tensors that the function took from around it are no inputs."""
    from onnx import numpy_helper

    used = {name for node in _walk(graph) for name in node.input}
    for outer, inner in concrete.graph.captures:
        kept = [item for item in graph.input if item.name != inner.name]
        if len(kept) < len(graph.input) and inner.name in used:
            value = numpy_helper.from_array(outer.numpy(), inner.name)
            graph.initializer.append(value)
        del graph.input[:]
        graph.input.extend(kept)


def _walk(graph: Any) -> Iterator[Any]:
    """The nodes of a graph and of the graphs inside of it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _walk(attribute.g)
            for subgraph in attribute.graphs:
                yield from _walk(subgraph)


def _convert_node(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Puts DeformConv, channels first, in the place of the native op."""

    def transpose(tensor: str, *axes: int) -> str:
        made = ctx.make_node(
            "Transpose", [tensor], {"perm": axes}, op_name_scope=name
        )
        return made.output[0]

    def integers(attribute: str) -> list[int]:
        return list(node.get_attr(attribute).ints)

    if node.get_attr_str("boundary") != "zeros":
        return  # Not from `_standard`: `_convert` says so.
    inputs, kernel, offset, *mask = node.input
    kernel_h, kernel_w, group_channels, _ = ctx.get_shape(kernel)
    attributes = {
        "kernel_shape": [kernel_h, kernel_w],
        "strides": integers("strides"),
        "dilations": integers("dilations"),
        "group": ctx.get_shape(inputs)[3] // group_channels,
        "offset_group": node.get_attr("offset_groups").i,
    }
    if node.get_attr_str("padding") == "SAME":
        attributes["auto_pad"] = "SAME_UPPER"  # `_pad_same` takes it away.
    else:
        paddings = integers("explicit_paddings") or (0, 0, 0, 0)
        top, bottom, left, right = paddings
        attributes["pads"] = [top, left, bottom, right]
    # Between offset and mask: no bias. The offsets' order is the same.
    operands = [
        transpose(inputs, 0, 3, 1, 2),
        transpose(kernel, 3, 2, 0, 1),
        transpose(offset, 0, 3, 1, 2),
        *(["", transpose(mask[0], 0, 3, 1, 2)] if mask else []),
    ]
    shapes, dtypes = node.output_shapes, node.output_dtypes
    outputs = node.output
    ctx.remove_node(node.name)
    made = ctx.make_node(
        "DeformConv", operands, attributes, op_name_scope=name, domain=_DOMAIN
    )
    ctx.make_node(
        "Transpose",
        [made.output[0]],
        {"perm": (0, 2, 3, 1)},
        outputs=outputs,
        shapes=shapes,
        dtypes=dtypes,
        op_name_scope=name,
    )


def _convert_erfc(ctx: Any, node: Any, name: str, _: Any) -> None:
    """1 - Erf, of which gelu is made."""
    dtype, shape = ctx.get_dtype(node.output[0]), ctx.get_shape(node.output[0])
    outputs, inputs = node.output, list(node.input)
    ctx.remove_node(node.name)
    erf = ctx.make_node("Erf", inputs, op_name_scope=name)
    one = ctx.make_const(f"{name}_one", np.ones((), "float32"))
    one = ctx.make_node("Cast", [one.output[0]], {"to": dtype})
    ctx.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=outputs,
        shapes=[shape],
        dtypes=[dtype],
        op_name_scope=name,
    )


def _convert_where(ctx: Any, node: Any, name: str, _: Any) -> None:
    """Chooses, where tf2onnx would add products with 0 and 1.

    What is not chosen may be NaN or infinite: zero times that is NaN.
    """
    from tf2onnx.onnx_opset import controlflow

    node.set_attr("handles_nan", 1)
    controlflow.Select.version_9(ctx, node)
    del node.attr["handles_nan"]


def _pad_same(graph: Any) -> None:
    """Pads explicitly where "same" is not what an operator makes of it.

    DeformConv does not have it; onnxruntime's Conv not with dilations, and with
    a stride beyond the kernel it cuts pixels off where it should leave them.
    """
    from onnx import helper

    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _pad_same(inner)
        attributes = {
            item.name: helper.get_attribute_value(item)
            for item in node.attribute
        }
        if attributes.get("auto_pad") == b"SAME_UPPER" and (
            node.domain == _DOMAIN or node.op_type == "Conv"
        ):
            kept = [x for x in node.attribute if x.name != "auto_pad"]
            del node.attribute[:]
            node.attribute.extend(kept)
            axes = len(attributes["kernel_shape"])
            strides = attributes.get("strides", [1] * axes)
            dilations = attributes.get("dilations", [1] * axes)
            spans = [
                dilation * (size - 1) + 1
                for dilation, size in zip(
                    dilations, attributes["kernel_shape"], strict=True
                )
            ]
            if max(strides) == 1:
                before = [(span - 1) // 2 for span in spans]
                after = [span // 2 for span in spans]  # Together span - 1.
                pads = helper.make_attribute("pads", before + after)
                node.attribute.append(pads)
            else:
                nodes += _pad_unknown_size(node, spans, strides)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _pad_unknown_size(
    node: Any, spans: Sequence[int], strides: Sequence[int]
) -> list[Any]:
    """Operators that pad a node's inputs as "same" says.

    Of `size` pixels the last stride begins at the last multiple of `stride`
    below `size`, `rest` pixels before the end: it lacks `span - rest`.
    """
    from onnx import helper, numpy_helper

    nodes = []

    def make(kind: str, *inputs: str | Sequence[int], **attributes: Any) -> str:
        operands = []
        for operand in inputs:
            if not isinstance(operand, str):
                value = numpy_helper.from_array(np.array(operand, "int64"))
                operand = make("Constant", value=value)
            operands.append(operand)
        name = f"{node.name}_same_{len(nodes)}"
        nodes.append(
            helper.make_node(kind, operands, [name], name, **attributes)
        )
        return name

    rest = make("Mod", make("Shape", node.input[0], start=2), strides)
    rest = make("Where", make("Equal", rest, [0]), strides, rest)
    total = make("Max", make("Sub", spans, rest), [0])
    before = make("Div", total, [2])
    after = make("Sub", total, before)
    pads = make("Concat", [0, 0], before, [0, 0], after, axis=0)
    node.input[0] = make("Pad", node.input[0], pads)
    return nodes


def _raise_opset(proto: Any, opset: int) -> Any:
    """The model in a newer opset, with DeformConv as the standard's."""
    import onnx

    _pad_same(proto.graph)
    _openvino.adapt(proto.graph)
    try:
        proto = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        raise ValueError(
            f"Expected a model that can be raised to opset {opset}. Received: "
            f"{error}"
        ) from error
    for node in _walk(proto.graph):
        if node.domain == _DOMAIN:
            node.domain = ""
    kept = [item for item in proto.opset_import if item.domain != _DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ValueError(
            f"Expected a model that ONNX can hold. Received: {error}"
        ) from error
    return proto
