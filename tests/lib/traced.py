# SPDX-License-Identifier: Apache-2.0
"""Lists the ops of traced functions."""

from collections.abc import Callable

import tensorflow as tf


def kinds_of_ops(function: Callable) -> set[str]:
    """Returns the types of the ops in the graph of a concrete function."""
    return {op.type for op in function.graph.get_operations()}


def implementations(function: Callable) -> set[str]:
    """Returns the implementations that a function calls while it is traced."""
    kinds = kinds_of_ops(tf.function(function).get_concrete_function())
    native = any(kind.startswith("TfDeform>") for kind in kinds)
    found = {"native": native, "portable": "GatherNd" in kinds}
    return {name for name in found if found[name]}
