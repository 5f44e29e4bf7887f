# SPDX-License-Identifier: Apache-2.0
"""Finds operations of a LiteRT file that may be quantized: not positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Maps LiteRT's names of operations that are quantized if their weights are
# constants to the quantizer's names. All other operations stay float.
_WEIGHTED = {
    "BATCH_MATMUL": "BATCH_MATMUL",
    "CONV_2D": "CONV_2D",
    "DEPTHWISE_CONV_2D": "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED": "FULLY_CONNECTED",
    "TRANSPOSE_CONV": "CONV_2D_TRANSPOSE",
}
# These operations read at the positions that their second operand holds.
_READS = ("GATHER", "GATHER_ND")
# The outputs of these operations depend on sizes, not on values.
_SIZES = ("RANK", "SHAPE", "ZEROS_LIKE")

# Identifies a tensor by the number of its graph and its own number.
_Tensor = tuple[int, int]


class _Node(NamedTuple):
    kind: str
    inputs: list[_Tensor | None]  # None is a constant.
    outputs: list[_Tensor]
    name: str  # Name of the first output.
    graphs: list[int]  # Graphs that it runs: branches, conditions and bodies.

    @property
    def has_weights(self) -> bool:
        return self.kind in _WEIGHTED and self.inputs[1] is None


class Quantizable(NamedTuple):
    """Holds the operations that a quantizer has to be told.

    Attributes:
        kinds: Kinds of operations that have weights.
        places: Outputs of such operations that have to compute in float32.
        products: Outputs of operations of these kinds that have no weights.
    """

    kinds: list[str]
    places: list[str]
    products: list[str]


def find_quantizable(content: bytes) -> Quantizable:
    """Finds operations of a file in float32 that may be quantized.

    These are the operations that have weights, with three exceptions. On the
    way back from each position at which an operation reads, nothing may be in 8
    bits up to the first operation with weights, whose output also has to stay
    in float32. Operations in loops and branches stay float, as the quantizer
    does not find their ranges. So do operations next to a result of the model
    that other operations also use: the quantizer would replace that result by a
    copy.
    """
    nodes, outputs = _read(content)
    makers = {tensor: node for node in nodes for tensor in node.outputs}
    callers = {graph: node for node in nodes for graph in node.graphs}
    seen: set[_Tensor] = set()
    waiting = [node.inputs[1] for node in nodes if node.kind in _READS]
    while waiting:
        tensor = waiting.pop()
        if tensor is None or tensor in seen:
            continue
        seen.add(tensor)
        node = makers.get(tensor)
        if node is None:
            # An input of a graph that another graph runs may be any operand of
            # that call.
            if tensor[0] in callers:
                waiting += callers[tensor[0]].inputs
        elif not node.has_weights and node.kind not in _SIZES:
            waiting += node.inputs
            for graph in node.graphs:
                waiting += outputs[graph]
    kept = {tensor for node in nodes for tensor in node.inputs}
    kept &= set(outputs[0])
    weighted = [node for node in nodes if node.has_weights]
    return Quantizable(
        sorted({_WEIGHTED[node.kind] for node in weighted}),
        [
            node.name
            for node in weighted
            if node.outputs[0] in seen
            or node.outputs[0][0] > 0
            or kept & {*node.inputs, node.outputs[0]}
        ],
        [
            node.name
            for node in nodes
            if node.kind in _WEIGHTED and not node.has_weights
        ],
    )


def set_sizes(content: bytes, shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Returns the file with these sizes of its inputs, until a caller resizes.

    Unknown sizes are 1 in the file, and the quantizer loads it with these
    sizes: they are too small for convolutions without padding. The first
    dimension stays, as it counts the batch.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (signature,) = model.signatureDefs
    tensors = model.subgraphs[signature.subgraphIndex].tensors
    changed = False
    for item in signature.inputs:
        tensor = tensors[item.tensorIndex]
        sizes = shapes[item.name.decode()][1:]
        if len(sizes) and list(tensor.shape[1:]) != list(sizes):
            tensor.shape = [tensor.shape[0], *sizes]
            changed = True
    if not changed:
        return content
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _read(content: bytes) -> tuple[list[_Node], list[list[_Tensor]]]:
    """Returns the operations of all graphs, and the outputs of each graph."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    kinds = {
        number: kind
        for kind, number in vars(schema.BuiltinOperator).items()
        if isinstance(number, int)
    }
    nodes, outputs = [], []
    for number, graph in enumerate(model.subgraphs):
        outputs.append([(number, tensor) for tensor in graph.outputs])
        constant = {
            tensor
            for tensor, item in enumerate(graph.tensors)
            if model.buffers[item.buffer].data is not None
            or model.buffers[item.buffer].offset > 1  # It lies behind the file.
        }
        for operator in graph.operators or []:
            code = model.operatorCodes[operator.opcodeIndex]
            code = max(code.builtinCode, code.deprecatedBuiltinCode)
            # The number -1 stands for an operand that is left out.
            given = [tensor for tensor in operator.inputs if tensor >= 0]
            made = list(operator.outputs)
            options = operator.builtinOptions
            options = vars(options) if options is not None else {}
            nodes.append(
                _Node(
                    kinds[code],
                    [None if t in constant else (number, t) for t in given],
                    [(number, t) for t in made],
                    graph.tensors[made[0]].name.decode() if made else "",
                    [
                        value
                        for key, value in options.items()
                        if key.lower().endswith("subgraphindex")
                    ],
                )
            )
    return nodes, outputs
