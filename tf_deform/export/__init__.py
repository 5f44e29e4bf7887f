# SPDX-License-Identifier: Apache-2.0
"""Writes models for other programs: SavedModel, ONNX, LiteRT."""

from tf_deform.export._common import Report
from tf_deform.export.litert import litert
from tf_deform.export.onnx import onnx
from tf_deform.export.saved_model import saved_model

__all__ = ["Report", "litert", "onnx", "saved_model"]
