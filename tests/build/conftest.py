# SPDX-License-Identifier: Apache-2.0
"""Makes the package's metadata, for every file of this folder."""

import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def metadata(tmp_path_factory) -> pathlib.Path:
    """Makes a folder with the metadata that pip would install from source."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir"]
    made = subprocess.run(
        [*command, folder],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return folder
