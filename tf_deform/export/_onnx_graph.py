# SPDX-License-Identifier: Apache-2.0
"""Changes ONNX models after they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tf_deform.export import _openvino

# Operators that opset 18 writes differently than a newer opset; tf2onnx writes
# none of them. (`onnx.version_converter` knows no private domains inside of
# conditions.)
CHANGED = ("DFT", "GridSample", "GroupNormalization")


def walk(graph: Any) -> Iterator[Any]:
    """Yields the nodes of a graph and of the graphs inside of it."""
    for part in _graphs(graph):
        yield from part.node


def _graphs(graph: Any) -> Iterator[Any]:
    """Yields a graph and all the graphs inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            # Reading the graph of an attribute that has none would set it.
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _pad_same(graph: Any) -> None:
    """Pads explicitly where an operator does not pad "same" as TensorFlow does.

    DeformConv has no such padding. onnxruntime's Conv has none with dilations,
    and with a stride larger than the kernel it cuts off pixels that it should
    keep.
    """
    from onnx import helper

    nodes = []
    for node in graph.node:
        attributes = {
            item.name: helper.get_attribute_value(item)
            for item in node.attribute
        }
        same = attributes.get("auto_pad") == b"SAME_UPPER"
        if same and node.op_type in ("Conv", "DeformConv"):
            kept = [x for x in node.attribute if x.name != "auto_pad"]
            del node.attribute[:]
            node.attribute.extend(kept)
            axes = len(attributes["kernel_shape"])
            strides = attributes.get("strides", [1] * axes)
            dilations = attributes.get("dilations", [1] * axes)
            spans = [
                dilation * (size - 1) + 1
                for dilation, size in zip(dilations, attributes["kernel_shape"])
            ]
            if max(strides) == 1:
                before = [(span - 1) // 2 for span in spans]
                after = [span // 2 for span in spans]  # The sum is span - 1.
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
    """Adds operators that pad a node's inputs as "same" says.

    Among `size` pixels the last window begins at the last multiple of `stride`
    below `size`, `rest` pixels before the end, and so lacks `span - rest`
    pixels.
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


def raise_opset(proto: Any, opset: int) -> Any:
    """Returns the model in a newer opset, with the standard's DeformConv."""
    import onnx

    for graph in _graphs(proto.graph):
        _pad_same(graph)
        # Removes types and shapes of tensors between nodes: tf2onnx does not
        # know all of them, and the checker infers them.
        del graph.value_info[:]
    _openvino.adapt(list(_graphs(proto.graph)))
    for node in walk(proto.graph):
        if node.op_type == "DeformConv":
            node.domain = ""  # tf2onnx has lost it inside of conditions.
        elif node.op_type in CHANGED:
            raise ValueError(
                f"Expected operations that mean the same in opset {opset}. "
                f"Received: {node.op_type} in {node.name!r}"
            )
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", opset))
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ValueError(
            f"Expected a model that ONNX can hold. Received: {error}"
        ) from error
    return proto
