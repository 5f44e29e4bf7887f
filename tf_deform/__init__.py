# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution and deformable ROI pooling for TensorFlow and Keras.

- `tf_deform.layers`: Keras layers.
- `tf_deform.ops`: functions of tensors, with gradients.
- `tf_deform.make_deformable`: a model's convolutions made deformable, in place.
- `tf_deform.data`: photographs with boxes or masks, as labelling tools write
  them.
- `tf_deform.training`: an optimizer with a learning rate for offsets.
- `tf_deform.visualization`: where layers look, in pictures and a page.
- `tf_deform.demo`: what deformable convolution is worth, on trees and digits.
- `tf_deform.export`: models as SavedModel, ONNX and LiteRT files.

Displacements are pairs `(dy, dx)`, and maps are `(batch, height, width,
channels)`, unless a layer's `data_format` says otherwise.
"""

from typing import TYPE_CHECKING, Any

from tf_deform import _tf2onnx, layers, models, ops, training
from tf_deform._build_info import VERSION as __version__
from tf_deform._implementation import implementation
from tf_deform._loader import is_built_with_cuda
from tf_deform.models import (
    deformable_layers,
    make_deformable,
    set_output_stride,
    train_only,
)

if TYPE_CHECKING:
    from tf_deform import data, demo, export, visualization
    from tf_deform._plain_weights import load_plain_weights

__all__ = [
    "__version__",
    "data",
    "demo",
    "deformable_layers",
    "export",
    "implementation",
    "is_built_with_cuda",
    "layers",
    "load_plain_weights",
    "make_deformable",
    "models",
    "ops",
    "set_output_stride",
    "train_only",
    "training",
    "visualization",
]

_tf2onnx.watch()


def __getattr__(name: str) -> Any:
    # Loading a model needs none of these: they are imported when used.
    if name == "data":
        import tf_deform.data as data

        return data
    if name == "demo":
        import tf_deform.demo as demo

        return demo
    if name == "export":
        import tf_deform.export as export  # `from` would come back to here.

        return export
    if name == "visualization":
        import tf_deform.visualization as visualization

        return visualization
    if name == "load_plain_weights":
        from tf_deform._plain_weights import load_plain_weights

        return load_plain_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
