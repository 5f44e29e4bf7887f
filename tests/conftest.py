# SPDX-License-Identifier: Apache-2.0
"""What every test file shares: quiet logs, a clean Keras, fresh processes."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(autouse=True)
def clean_keras() -> Iterator[None]:
    """Every test starts from the same seeds, names and dtype policy."""
    import keras

    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs a script in a process of its own and returns what it printed.

    It imports the same `tf_deform` as the tests do.
    """
    import tf_deform

    home = str(pathlib.Path(tf_deform.__file__).parent.parent)

    def run(script: str, *arguments: object, **environment: object) -> str:
        path = [home, os.environ.get("PYTHONPATH", "")]
        result = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                **{name: str(value) for name, value in environment.items()},
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
