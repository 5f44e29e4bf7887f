# SPDX-License-Identifier: Apache-2.0
"""What helps to train models, with deformable layers or without.

On Keras 2 there are `SamplingMonitor` and `deformable_optimizer` alone.
"""

from __future__ import annotations

from typing import Any

from tf_deform._keras import KERAS_2, keras
from tf_deform.training._monitor import SamplingMonitor
from tf_deform.training._optimizer import deformable_optimizer

if not KERAS_2:
    from tf_deform.training._anchors import anchor_report
    from tf_deform.training._checkpoints import BestAndLast
    from tf_deform.training._coco import CocoCallback, CocoEvaluator
    from tf_deform.training._ema import EmaEvaluation
    from tf_deform.training._mean_iou import MeanIoU
    from tf_deform.training._metrics import TensorBoardLogs, write_metrics
    from tf_deform.training._schedules import WarmUpSteps

__all__ = [
    "BestAndLast",
    "CocoCallback",
    "CocoEvaluator",
    "EmaEvaluation",
    "MeanIoU",
    "SamplingMonitor",
    "TensorBoardLogs",
    "WarmUpSteps",
    "anchor_report",
    "deformable_optimizer",
    "write_metrics",
]


def __getattr__(name: str) -> Any:
    if name in _KERAS_3:
        raise ImportError(
            f"Expected Keras 3 for tf_deform.training.{name}. Received: "
            f"{keras.__name__} {keras.__version__}, which TensorFlow's "
            "`tf.keras` is"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What Keras 2 does not have.
_KERAS_3 = frozenset(__all__) - set(globals())
if KERAS_2:
    __all__ = ["SamplingMonitor", "deformable_optimizer"]
