# SPDX-License-Identifier: Apache-2.0
"""Sets up every test: quiet logs, a clean Keras, fresh processes, a device.

TensorFlow runs on the CPU or, with the environment variable
TF_DEFORM_TEST_DEVICE=/GPU:0, on that device (`make gpu-check-tf`).
"""

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

# Failures inside of helpers show the compared values too.
pytest.register_assert_rewrite(
    *(path.stem for path in pathlib.Path(__file__).parent.glob("lib/*.py"))
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow uses oneDNN by itself on processors with VNNI alone. The references
# need it everywhere: for channels first, and to rewrite graphs to bfloat16.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
DEVICE = os.environ.get("TF_DEFORM_TEST_DEVICE")
if DEVICE is None and os.environ.get("TF_DEFORM_TEST_GPU") != "1":
    # TensorFlow would place every op on a GPU if it saw a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

# Many tests require the same bits twice, or float32 without TF32. The behaviour
# without these settings is tested in gpu_test.py.
_SETTINGS = """
import tensorflow
tensorflow.config.experimental.enable_op_determinism()
tensorflow.config.experimental.enable_tensor_float_32_execution(False)
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cpu_only(reason): what is tested holds on the CPU alone"
    )
    config.addinivalue_line(
        "markers", "slow: not by default, see `make test-full`"
    )
    if DEVICE is None:
        return
    import tensorflow as tf

    import tf_deform

    name = DEVICE.removeprefix("/").removeprefix("device:")
    devices = [device.name for device in tf.config.list_logical_devices()]
    if f"/device:{name}" not in devices:
        raise pytest.UsageError(
            f"Expected TensorFlow to see TF_DEFORM_TEST_DEVICE={DEVICE}. "
            f"Received: {', '.join(devices)}. On a machine with a GPU, "
            "`pip install 'tensorflow[and-cuda]'` brings what TensorFlow needs "
            "to see it."
        )
    if name.startswith("GPU") and not tf_deform.is_built_with_cuda():
        raise pytest.UsageError(
            "Expected a tf_deform with GPU kernels. Received: one that was "
            "built without nvcc; see TF_DEFORM_NVCC in CONTRIBUTING.md."
        )
    exec(_SETTINGS, {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow folders first, so that all processes end together."""
    order = ["models", "export", "gpu", "xla", "layers", "core", "ops"]

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return order.index(folder) if folder in order else len(order)

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("cpu_only")
    if mark and DEVICE and "GPU" in DEVICE:
        pytest.skip(f"on the CPU only: {mark.kwargs['reason']}")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Runs the test on the device that TF_DEFORM_TEST_DEVICE names."""
    if DEVICE is None:
        yield
        return
    import tensorflow as tf

    with tf.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def clean_keras() -> Iterator[None]:
    """Starts every test from the same seeds, names and dtype policy."""
    from tf_deform._keras import KERAS_2, keras

    if KERAS_2:
        keras.backend.clear_session()
    else:
        keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy("float32")
    yield
    keras.mixed_precision.set_global_policy("float32")


def _run_python(
    settings: str, script: str, *arguments: object, **environment: object
) -> str:
    import tf_deform

    home = str(pathlib.Path(tf_deform.__file__).parent.parent)
    path = [home, os.environ.get("PYTHONPATH", "")]
    environment = {name: str(value) for name, value in environment.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    result = subprocess.run(
        [sys.executable, "-c", settings + script, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs a script in a process of its own and returns its output.

    The script imports the same `tf_deform` as the tests do, and has their
    settings.
    """
    return functools.partial(_run_python, _SETTINGS if DEVICE else "")


@pytest.fixture(scope="session")
def run_python_as_it_is() -> Callable[..., str]:
    """Does the same with TensorFlow's own settings."""
    return functools.partial(_run_python, "")
