# SPDX-License-Identifier: Apache-2.0
"""Names the folder of fetched files.

This module imports nothing of the package, so that the command can run it as a
file of its own, before TensorFlow is loaded or where it is missing.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "TF_DEFORM_CACHE"


def cache_folder() -> str:
    """Returns the folder of fetched files, which may not exist.

    It is the value of the environment variable TF_DEFORM_CACHE, or else the
    folder tf_deform in the platform's folder for caches. It is the only thing
    that uninstalling the package leaves behind.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return os.path.abspath(os.path.expanduser(named))
    if sys.platform == "darwin":
        parent = "~/Library/Caches"
    else:
        # The specification of these folders has relative ones ignored.
        parent = os.environ.get("XDG_CACHE_HOME", "")
        parent = parent if os.path.isabs(parent) else "~/.cache"
    return os.path.join(os.path.expanduser(parent), "tf_deform")
