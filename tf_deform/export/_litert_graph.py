# SPDX-License-Identifier: Apache-2.0
"""What of a LiteRT file may be quantized: all that does not decide places."""

from typing import NamedTuple

# What is quantized if its weights are constants. All else stays float.
_WEIGHTED = (
    "BATCH_MATMUL",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED",
    "TRANSPOSE_CONV",
)
# What reads where its second operand says.
_READS = ("GATHER", "GATHER_ND")
# What depends on sizes, not on values.
_SIZES = ("RANK", "SHAPE", "ZEROS_LIKE")

# A tensor: its graph's number and its own.
_Tensor = tuple[int, int]


class _Node(NamedTuple):
    kind: str
    inputs: list[_Tensor | None]  # None is a constant.
    outputs: list[_Tensor]
    names: list[str]  # Of outputs.
    graphs: list[int]  # That it runs: branches, conditions and bodies.

    @property
    def has_weights(self) -> bool:
        return self.kind in _WEIGHTED and None in self.inputs[:2]


class Quantizable(NamedTuple):
    """What a quantizer has to be told.

    Attributes:
        kinds: Kinds of operations that stay float.
        names: Outputs of other operations that stay float.
        any: Whether something remains.
    """

    kinds: list[str]
    names: list[str]
    any: bool


def find_quantizable(content: bytes) -> Quantizable:
    """Finds what of a file in float32 may be quantized.

    Only operations with weights, and none from which it comes where something
    is read: on the way back from every place that is read there is nothing
    quantized before the first one with weights, which stays float, too.
    """
    nodes, outputs = _read(content)
    makers = {tensor: node for node in nodes for tensor in node.outputs}
    callers = {graph: node for node in nodes for graph in node.graphs}
    seen: set[_Tensor] = set()
    waiting = [node.inputs[1] for node in nodes if node.kind in _READS]
    unsafe = {
        name
        for node in nodes
        if node.kind in _WEIGHTED and not node.has_weights
        for name in node.names
    }
    while waiting:
        tensor = waiting.pop()
        if tensor is None or tensor in seen:
            continue
        seen.add(tensor)
        node = makers.get(tensor)
        if node is None:
            # An input: of a graph that another runs, whatever that gives it.
            if tensor[0] in callers:
                waiting += callers[tensor[0]].inputs
        elif node.has_weights:
            unsafe.update(node.names)
        elif node.kind not in _SIZES:
            waiting += node.inputs
            for graph in node.graphs:
                waiting += outputs[graph]
    kinds = {node.kind for node in nodes}
    return Quantizable(
        sorted(kinds.difference(_WEIGHTED)),
        sorted(unsafe),
        any(
            node.kind in _WEIGHTED and unsafe.isdisjoint(node.names)
            for node in nodes
        ),
    )


def _read(content: bytes) -> tuple[list[_Node], list[list[_Tensor]]]:
    """The operations of all graphs, and the outputs of each graph."""
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
            or model.buffers[item.buffer].offset > 1  # Behind the file's end.
        }
        for operator in graph.operators or []:
            code = model.operatorCodes[operator.opcodeIndex]
            code = max(code.builtinCode, code.deprecatedBuiltinCode)
            # An operand that is left out is -1.
            given = [tensor for tensor in operator.inputs if tensor >= 0]
            made = list(operator.outputs)
            options = operator.builtinOptions
            options = vars(options) if options is not None else {}
            nodes.append(
                _Node(
                    kinds[code],
                    [None if t in constant else (number, t) for t in given],
                    [(number, t) for t in made],
                    [graph.tensors[t].name.decode() for t in made],
                    [
                        value
                        for key, value in options.items()
                        if key.lower().endswith("subgraphindex")
                    ],
                )
            )
    return nodes, outputs
