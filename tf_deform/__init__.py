# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution for TensorFlow and Keras."""

from tf_deform import _tf2onnx, export, layers, ops
from tf_deform._build_info import VERSION as __version__
from tf_deform._implementation import implementation
from tf_deform._loader import is_built_with_cuda
from tf_deform._plain_weights import load_plain_weights

__all__ = [
    "__version__",
    "export",
    "implementation",
    "is_built_with_cuda",
    "layers",
    "load_plain_weights",
    "ops",
]

_tf2onnx.watch()
