# SPDX-License-Identifier: Apache-2.0
"""What OpenVINO needs to read an ONNX file that ONNX Runtime reads as it is."""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

# What tf2onnx writes for "to the end".
_OPEN = np.iinfo("int32").max


def adapt(graph: Any) -> None:
    """Writes a graph, and those inside of it, as OpenVINO wants them.

    Args:
        graph: `onnx.GraphProto`, changed in place.
    """
    graphs = list(_graphs(graph))
    for inner in graphs[1:]:
        _copy_unchanged(inner)
    _open_slices(graphs)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            # Reading the graph of one that has none would give it one.
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _copy_unchanged(graph: Any) -> None:
    """Gives what a loop hands on unchanged a name of its own.

    OpenVINO loses an input of the loop's body that is also an output.
    """
    from onnx import helper

    inputs = {value.name for value in graph.input}
    for index, output in enumerate(graph.output):
        if output.name in inputs:
            name = f"{output.name}_unchanged_{index}"
            node = helper.make_node("Identity", [output.name], [name], name)
            graph.node.append(node)
            output.name = name


def _open_slices(graphs: list[Any]) -> None:
    """Ends slices that have no end at the largest int64, not int32.

    OpenVINO takes the end for the most that an unknown size may be. With the
    padding of a convolution added it is too large for an int32, of which
    TensorFlow's sizes are, and shapes no longer fit.
    """
    from onnx import TensorProto, numpy_helper

    constants = {
        tensor.name: tensor
        for graph in graphs
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT64
    }
    uses = collections.Counter()
    for graph in graphs:
        uses.update(name for node in graph.node for name in node.input)
        uses.update(output.name for output in graph.output)
    replaced = set()
    for graph in graphs:
        for node in graph.node:
            if node.op_type != "Slice" or node.input[2] not in constants:
                continue
            old = node.input[2]
            ends = numpy_helper.to_array(constants[old])
            if _OPEN not in ends:
                continue
            name = f"{old}_open"
            if name not in replaced:
                ends = np.where(ends == _OPEN, np.iinfo("int64").max, ends)
                graphs[0].initializer.append(
                    numpy_helper.from_array(ends, name)
                )
                replaced.add(name)
            node.input[2] = name
            uses[old] -= 1
    # onnxruntime warns of what nobody uses.
    for graph in graphs:
        kept = [
            tensor
            for tensor in graph.initializer
            if uses[tensor.name] or f"{tensor.name}_open" not in replaced
        ]
        del graph.initializer[:]
        graph.initializer.extend(kept)
