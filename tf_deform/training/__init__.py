# SPDX-License-Identifier: Apache-2.0
"""What helps to train models, with deformable layers or without.

On Keras 2 there are `SamplingMonitor` and `deformable_optimizer` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tf_deform._keras import KERAS_2, keras
from tf_deform.training._monitor import SamplingMonitor
from tf_deform.training._optimizer import deformable_optimizer

if TYPE_CHECKING:
    from tf_deform.training._anchors import AnchorReport, anchor_report
    from tf_deform.training._checkpoints import BestAndLast
    from tf_deform.training._coco import CocoCallback, CocoEvaluator
    from tf_deform.training._ema import EmaEvaluation
    from tf_deform.training._mean_iou import MeanIoU
    from tf_deform.training._metrics import TensorBoardLogs, write_metrics
    from tf_deform.training._schedules import WarmUpSteps

__all__ = [
    "AnchorReport",
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
# What is for Keras 3, and imported when used.
_MODULES = {
    "AnchorReport": "_anchors",
    "BestAndLast": "_checkpoints",
    "CocoCallback": "_coco",
    "CocoEvaluator": "_coco",
    "EmaEvaluation": "_ema",
    "MeanIoU": "_mean_iou",
    "TensorBoardLogs": "_metrics",
    "WarmUpSteps": "_schedules",
    "anchor_report": "_anchors",
    "write_metrics": "_metrics",
}
if KERAS_2:
    __all__ = [name for name in __all__ if name not in _MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if KERAS_2:
        raise ImportError(
            f"Expected Keras 3 for tf_deform.training.{name}. Received: "
            f"{keras.__name__} {keras.__version__}, which TensorFlow's "
            "`tf.keras` is"
        )
    module = importlib.import_module(f"tf_deform.training.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
