# SPDX-License-Identifier: Apache-2.0
"""Tells tf2onnx to refuse native ops.

tf2onnx only logs an op that it does not know and an error that a handler
raises, and then writes a file that no runtime loads. Keras' `model.export` and
other programs call tf2onnx without a call to this package, also for graphs that
were traced before.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "tf2onnx.handler"
# Names all native ops, including the gradient ops.
OPS = [
    f"TfDeform>{name}{suffix}"
    for name in (
        "DeformableConv2D",
        "DeformablePSROIPool",
        "DeformableROIAlign",
    )
    for suffix in ("", "Grad")
]


class _Refusal:
    """Holds handlers by version of the standard, as tf2onnx wants them."""

    @classmethod
    def version_1(cls, ctx: Any, node: Any, **kwargs: Any) -> None:
        kind, name = node.type, node.name

        def refuse(*_: Any) -> None:
            raise ValueError(
                f"Expected a graph of operations that ONNX has. Received: "
                f"{kind} in {name!r}, a native op in a function that was "
                "traced before. Use tf_deform.export.onnx, or trace it inside "
                'tf_deform.implementation("portable")'
            )

        # tf2onnx only logs an error that a handler raises, but passes on an
        # error that is raised while the node is written.
        node.update_proto = refuse


def _register(registry: ModuleType) -> None:
    registry.tf_op(OPS)(_Refusal)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the handlers when, and if, tf2onnx is imported."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Registers the handlers now, or as soon as tf2onnx is imported."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _Finder())
