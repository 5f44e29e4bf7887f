# SPDX-License-Identifier: Apache-2.0
"""Models with deformable layers."""

from typing import Any

from tf_deform import _keras
from tf_deform.layers._search import deformable_layers
from tf_deform.models._output_stride import set_output_stride
from tf_deform.models._surgery import Surgery, make_deformable
from tf_deform.models._training import train_only

__all__ = [
    "Surgery",
    "deformable_layers",
    "make_deformable",
    "set_output_stride",
    "train_only",
]

# Imported at once, so that Keras finds the classes of models in files.
if not _keras.KERAS_2:
    from tf_deform.models._backbones import backbone
    from tf_deform.models._faster_rcnn import FasterRCNN
    from tf_deform.models._rfcn import RFCN
    from tf_deform.models._segmenter import Segmenter
    from tf_deform.models._serving import predictions, serving

    __all__ += [
        "FasterRCNN",
        "RFCN",
        "Segmenter",
        "backbone",
        "predictions",
        "serving",
    ]

_OF_KERAS_3 = {
    "FasterRCNN",
    "RFCN",
    "Segmenter",
    "backbone",
    "predictions",
    "serving",
}


def __getattr__(name: str) -> Any:
    if name in _OF_KERAS_3:
        raise ImportError(
            f"Expected Keras 3 for `tf_deform.models.{name}`. Received: "
            f"{_keras.keras.__name__} {_keras.keras.__version__}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
