# SPDX-License-Identifier: Apache-2.0
"""Lets KerasHub load presets of models that were made deformable.

    import keras_hub
    import tf_deform.hub

    tf_deform.make_deformable(backbone)
    backbone.save_to_preset("preset")
    backbone = keras_hub.models.Backbone.from_preset("preset")

`save_to_preset` and `from_preset` are KerasHub's own. Importing this module
tells `from_preset` which class such a preset has: that of the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from keras_hub.src.utils import preset_utils
except ImportError as error:
    raise ImportError(
        "Expected KerasHub to be installed. Received: "
        f"{error}. Run `pip install 'tf-deform[hub]'`"
    ) from error

from tf_deform.models import _saving

__all__: list[str] = []

_check_config_class = preset_utils.check_config_class


def _class_of(config: Mapping[str, Any]) -> type:
    """Returns the class of a preset, for KerasHub's checks."""
    if config.get("registered_name") == _saving.REGISTERED_NAME:
        config = config["config"]["plain"]
    return _check_config_class(config)


preset_utils.check_config_class = _class_of
