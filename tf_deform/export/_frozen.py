# SPDX-License-Identifier: Apache-2.0
"""Makes graphs without variables of traced models, for converters."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import function_pb2, node_def_pb2
from tensorflow.python.framework.function_def_to_graph import (
    function_def_to_graph,
)

# Maps an operation that calls functions to the names of their attributes, and
# to the number of inputs before the functions' arguments.
_CALLS = {
    "If": (("then_branch", "else_branch"), 1),
    "StatelessIf": (("then_branch", "else_branch"), 1),
    "While": (("cond", "body"), 0),
    "StatelessWhile": (("cond", "body"), 0),
}


def keep_captures(graph_def: Any, concrete: Any) -> bool:
    """Makes constants of tensors that a function captures from outside.

    Freezing does this with variables alone.

    Args:
        graph_def: The frozen function. Changed in place.
        concrete: The function before freezing.

    Returns:
        Whether the function has such a tensor.
    """
    found = False
    captures = {
        inner.op.name: outer
        for outer, inner in concrete.graph.captures
        if outer.dtype not in (tf.resource, tf.variant)
    }
    for node in graph_def.node:
        if node.op == "Placeholder" and node.name in captures:
            value = tf.make_tensor_proto(captures[node.name])
            node.CopyFrom(_constant(node.name, value))
            found = True
    return found


def _constant(name: str, value: Any) -> Any:
    node = node_def_pb2.NodeDef(name=name, op="Const")
    node.attr["dtype"].type = value.dtype
    node.attr["value"].tensor.CopyFrom(value)
    return node


def keep_shapes(graph: tf.Graph, traced: tf.Graph) -> None:
    """Gives a frozen graph the shapes that were known when it was traced.

    Python code knows some shapes that TensorFlow's inference does not find
    again, such as the shapes of elements that a loop leaves in a list.
    """
    known = {operation.name: operation for operation in traced.get_operations()}
    for operation in graph.get_operations():
        before = known.get(operation.name)
        if before is None or before.type != operation.type:
            continue
        for output, old in zip(operation.outputs, before.outputs):
            if output.shape.is_compatible_with(old.shape):
                output.set_shape(old.shape)


def specialise(graph_def: Any) -> None:
    """Gives functions of conditions and loops their arguments' shapes.

    Each call gets a function of its own, which knows its arguments' shapes and
    holds the constants among them: a converter that looks at the function
    cannot find them in any other way. (tf2onnx tells the function the shapes,
    but takes a condition's first argument for the condition, and every other
    argument for the one before it.)

    Args:
        graph_def: A frozen function. Changed in place.
    """
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        library = {x.signature.name: x for x in graph_def.library.function}
        made = list(
            _specialise(graph, graph_def.node, library, itertools.count())
        )
    library.update({function.signature.name: function for function in made})
    called = _find_called(graph_def.node, library)
    functions = [library[name] for name in called]
    del graph_def.library.function[:]
    graph_def.library.function.extend(functions)


def _find_called(nodes: Any, library: Mapping[str, Any]) -> dict[str, None]:
    """Returns the names of all functions that nodes call, also indirectly."""
    called = {}
    for node in nodes:
        for value in node.attr.values():
            for function in (value.func, *value.list.func):
                if function.name in library:
                    called[function.name] = None
                    body = library[function.name].node_def
                    called.update(_find_called(body, library))
    return called


def _specialise(
    graph: tf.Graph,
    nodes: Any,
    library: Mapping[str, Any],
    number: Iterator[int],
) -> Iterator[Any]:
    """Returns new functions; `nodes`, the nodes of `graph`, then call them."""
    for node in nodes:
        if node.op not in _CALLS:
            continue
        operation = graph.get_operation_by_name(node.name)
        attributes, skipped = _CALLS[node.op]
        operands = operation.inputs[skipped:]
        shapes = [operand.shape for operand in operands]
        constants = [_find_constant(operand) for operand in operands]
        loop = "body" in attributes
        if loop:
            body = library[node.attr["body"].func.name]
            for index, kept in enumerate(_find_invariants(body)):
                if not kept:
                    shapes[index] = operation.outputs[index].shape
                    constants[index] = None
        for attribute in attributes:
            called = node.attr[attribute].func
            function = function_pb2.FunctionDef()
            function.CopyFrom(library[called.name])
            suffix = f"_{next(number)}"
            called.name += suffix
            function.signature.name = called.name
            _rename(function, suffix)
            _tell_shapes(function, shapes)
            _hold_constants(function, constants, loop)
            inner = function_def_to_graph(function)
            yield from _specialise(inner, function.node_def, library, number)
            yield function


def _rename(function: Any, suffix: str) -> None:
    """Gives nodes and arguments names that no other function has.

    ONNX has one namespace for the names inside of a loop and the names around
    it.
    """
    owned = [*function.node_def, *function.signature.input_arg]
    names = {item.name: item.name + suffix for item in owned}

    def follow(reference: str) -> str:
        control = "^" * reference.startswith("^")
        name, colon, output = reference[len(control) :].partition(":")
        return f"{control}{names[name]}{colon}{output}"

    for item in owned:
        item.name = names[item.name]
    for node in function.node_def:
        node.input[:] = [follow(reference) for reference in node.input]
        node.attr.pop("_class", None)  # It names nodes to be placed next to.
    for results in (function.ret, function.control_ret):
        for key, reference in list(results.items()):
            results[key] = follow(reference)


def _find_constant(tensor: tf.Tensor) -> Any:
    """Returns a constant tensor's value as TensorProto, otherwise None."""
    operation = tensor.op
    while operation.type == "Identity":
        operation = operation.inputs[0].op
    return operation.get_attr("value") if operation.type == "Const" else None


def _find_invariants(body: Any) -> list[bool]:
    """Tells for each argument of a loop's body whether it is returned as is."""
    nodes = {node.name: node for node in body.node_def}
    kept = []
    for given, returned in zip(
        body.signature.input_arg, body.signature.output_arg
    ):
        name = body.ret[returned.name]
        while (node := nodes.get(name.split(":")[0])) is not None:
            if node.op != "Identity":
                break
            name = node.input[0]
        kept.append(name == given.name)
    return kept


def _tell_shapes(function: Any, shapes: list[tf.TensorShape]) -> None:
    for index, (argument, shape) in enumerate(
        zip(function.signature.input_arg, shapes)
    ):
        if tf.as_dtype(argument.type) in (tf.resource, tf.variant):
            continue
        known = function.arg_attr[index].attr["_output_shapes"]
        known.Clear()
        known.list.shape.add().CopyFrom(shape.as_proto())


def _hold_constants(function: Any, values: list[Any], loop: bool) -> None:
    """Replaces the uses of an argument by a constant; the argument stays.

    A loop returns its arguments as they came, whether they are constant or not.
    """
    taken = {node.name for node in function.node_def}
    taken.update(argument.name for argument in function.signature.input_arg)
    instead = {}
    for argument, value in zip(function.signature.input_arg, values):
        if value is not None:
            name = f"{argument.name}_constant"
            while name in taken:
                name += "_"
            taken.add(name)
            instead[argument.name] = _constant(name, value)
    used = {}
    for node in function.node_def:
        for index, name in enumerate(node.input):
            if name in instead:
                used[name] = instead[name]
                node.input[index] = f"{instead[name].name}:output:0"
    if not loop:
        for key, name in function.ret.items():
            if name in instead:
                used[name] = instead[name]
                function.ret[key] = f"{instead[name].name}:output:0"
    function.node_def.extend(used.values())
