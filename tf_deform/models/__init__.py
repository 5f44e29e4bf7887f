# SPDX-License-Identifier: Apache-2.0
"""Models with deformable layers."""

from __future__ import annotations

from typing import Any

from tf_deform._keras import KERAS_2, keras
from tf_deform.layers._search import deformable_layers
from tf_deform.models._output_stride import set_output_stride
from tf_deform.models._surgery import Surgery, make_deformable
from tf_deform.models._training import train_only

# Files of these models are loaded after `import tf_deform` alone, which has to
# know their classes.
if not KERAS_2:
    from tf_deform.models._backbones import backbone
    from tf_deform.models._faster_rcnn import FasterRCNN
    from tf_deform.models._rfcn import RFCN
    from tf_deform.models._serving import serving

__all__ = [
    "FasterRCNN",
    "RFCN",
    "Surgery",
    "backbone",
    "deformable_layers",
    "make_deformable",
    "serving",
    "set_output_stride",
    "train_only",
]


def __getattr__(name: str) -> Any:
    if KERAS_2 and name in __all__:
        raise AttributeError(
            f"Expected Keras 3 for tf_deform.models.{name}. Received: "
            f"{keras.__name__} {keras.__version__}, which TensorFlow's "
            "`tf.keras` is"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
