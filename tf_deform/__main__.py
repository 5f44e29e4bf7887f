# SPDX-License-Identifier: Apache-2.0
"""Runs the command: `python -m tf_deform` is `tf-deform`."""

import sys

from tf_deform_cli import main

if __name__ == "__main__":
    sys.exit(main())
