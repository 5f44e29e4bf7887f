# SPDX-License-Identifier: Apache-2.0
"""Changes ONNX files for OpenVINO; ONNX Runtime reads them without changes."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

# tf2onnx writes this number for "to the end".
_OPEN = np.iinfo("int32").max


def adapt(graphs: Sequence[Any]) -> None:
    """Writes graphs as OpenVINO needs them.

    Args:
        graphs: `onnx.GraphProto`s, changed in place: a model's graph, and the
            graphs inside of it.
    """
    for graph in graphs[1:]:
        _copy_unchanged(graph)
    _open_slices(graphs)


def _copy_unchanged(graph: Any) -> None:
    """Gives tensors that a loop hands on unchanged a name of their own.

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


def _open_slices(graphs: Sequence[Any]) -> None:
    """Ends slices that have no end at the largest int64, not int32.

    OpenVINO takes the end for the largest value of an unknown size. With the
    padding of a convolution added, this value is too large for an int32, the
    type of TensorFlow's sizes, and the shapes no longer fit.
    """
    from onnx import numpy_helper

    uses = collections.Counter()
    for graph in graphs:
        uses.update(name for node in graph.node for name in node.input)
        uses.update(output.name for output in graph.output)
    unused = set()
    for graph in graphs:
        constants = {
            tensor.name: tensor
            for tensor in (*graphs[0].initializer, *graph.initializer)
        }
        for node in graph.node:
            if node.op_type != "Slice" or node.input[2] not in constants:
                continue
            old = node.input[2]
            ends = numpy_helper.to_array(constants[old])
            if ends.dtype != np.int64 or _OPEN not in ends:
                continue
            node.input[2] = f"{node.output[0]}_ends"
            ends = np.where(ends == _OPEN, np.iinfo("int64").max, ends)
            graph.initializer.append(
                numpy_helper.from_array(ends, node.input[2])
            )
            uses[old] -= 1
            if not uses[old]:
                unused.add(old)
    # Removes unused initializers, as onnxruntime warns of them.
    for graph in graphs:
        kept = [x for x in graph.initializer if x.name not in unused]
        del graph.initializer[:]
        graph.initializer.extend(kept)
