# SPDX-License-Identifier: Apache-2.0
"""Tests which op library is loaded: one for this TensorFlow, or none."""

import importlib.util
import pathlib
import re

import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info, _loader

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(tf_deform.__file__).parent
VERSIONS = ("2.15.1", "2.16.2", "2.17.1", "2.18.1", "2.19.1", "2.20.0")
VERSIONS += ("2.21.0",)


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def mark(version: str) -> bytes:
    """Returns the text by which a library tells whose headers it has."""
    return f"\0tf_deform for TensorFlow {version}\0".encode()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns a function that puts a file in place of the library.

    The package then is one with libraries for seven versions, and TensorFlow
    has the version that is given.
    """

    def install(content: bytes, tensorflow: str, libraries=VERSIONS) -> str:
        path = tmp_path / "ops.so"
        path.write_bytes(content)
        built = {minor(full): (full, True) for full in libraries}
        monkeypatch.setattr(_build_info, "LIBRARIES", built)
        monkeypatch.setattr(_loader, "LIBRARY", str(path))
        monkeypatch.setattr(_loader, "forced", lambda: None)
        monkeypatch.setattr(tf, "__version__", tensorflow)
        return str(path)

    return install


def op_library():
    """Looks for the library anew."""
    return _loader.op_library.__wrapped__()


def assert_not_loaded(path: str) -> None:
    assert path not in pathlib.Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("built", VERSIONS)
@pytest.mark.parametrize("installed", VERSIONS)
def test_a_library_of_another_version_is_refused(
    installed, built, install, monkeypatch
):
    """Tests every pair, with a file that is no library.

    A try to load it would be another error.
    """
    path = install(b"text" + mark(built) + b"text", installed)
    if installed == built:
        with pytest.raises(tf.errors.NotFoundError, match="invalid ELF|short"):
            op_library()
        return
    with pytest.raises(ImportError) as error:
        op_library()
    assert str(error.value).startswith(
        f"Expected {path} to be for TensorFlow {minor(installed)}, which is "
        f"{installed} here. Received: a library for TensorFlow {built}. "
    )


def test_a_sound_library_is_not_loaded(install):
    """Tests that no part of a refused library comes into the process."""
    path = pathlib.Path(_loader.LIBRARY)
    assert str(path) in pathlib.Path("/proc/self/maps").read_text()
    full, _ = _build_info.LIBRARIES[minor(tf.__version__)]
    content = path.read_bytes()
    assert content.count(mark(full)) == 1
    # The new text is as long as the old text: nothing in the file may move.
    other = "9" + full[1:]
    path = install(content.replace(mark(full), mark(other)), full)
    with pytest.raises(ImportError, match=f"Received: .* TensorFlow {other}"):
        op_library()
    assert_not_loaded(path)


def test_a_file_without_a_version_is_refused(install):
    path = install(b"\0tf_deform for TensorFlow \0", "2.21.0")
    with pytest.raises(ImportError, match="Received: .* of unknown version"):
        op_library()
    assert_not_loaded(path)


@pytest.mark.parametrize("installed", ["2.18.0", "2.18.2", "2.18.0-rc1"])
def test_a_library_of_the_same_minor_version_is_loaded(
    installed, install, monkeypatch
):
    install(mark("2.18.1"), installed)
    monkeypatch.setattr(_loader, "_load", lambda: "loaded")
    assert op_library() == "loaded"


@pytest.mark.parametrize("installed", ["2.14.1", "2.2.1", "2.22.0", "3.21.0"])
def test_an_unsupported_tensorflow(installed, install, monkeypatch):
    """Tests the error, which also says how to go on without a library."""
    install(mark(installed), installed)
    with pytest.raises(ImportError) as error:
        op_library()
    text = str(error.value)
    assert text.startswith(
        "Expected TensorFlow 2.15, 2.16, 2.17, 2.18, 2.19, 2.20, 2.21, for "
    )
    assert f"Received: TensorFlow {installed}. " in text
    assert "pip install 'tensorflow==2.21.*'" in text
    assert "TF_DEFORM_IMPLEMENTATION=portable" in text
    assert not _loader.has_xla()
    monkeypatch.setattr(_loader, "forced", lambda: "portable")
    assert op_library() is None


def test_a_package_without_libraries(install, monkeypatch):
    """Tests that a file which the package does not know is not taken."""
    install(mark("2.21.0"), "2.21.0", libraries=())
    with pytest.warns(RuntimeWarning, match="no such file") as caught:
        assert op_library() is None
    assert len(caught) == 1
    monkeypatch.setattr(_loader, "forced", lambda: "native")
    with pytest.raises(ImportError, match="Expected the native ops"):
        op_library()


# What the build tells.


def test_the_build_tells_what_it_made():
    assert _build_info.VERSION == tf_deform.__version__
    assert (PACKAGE / _build_info.CORE).exists()
    assert minor(tf.__version__) in _build_info.LIBRARIES
    found = {path.name for path in PACKAGE.glob("_ops_*.so")}
    assert found == {f"_ops_{name}.so" for name in _build_info.LIBRARIES}
    for name, (full, xla) in _build_info.LIBRARIES.items():
        assert minor(full) == name
        content = (PACKAGE / f"_ops_{name}.so").read_bytes()
        assert content.count(mark(full)) == 1
        assert (b"GetXlaFfiApi" in content) == xla
        # The op library finds the core in its own folder.
        assert content.count(b"\0$ORIGIN\0") == 1
        assert content.count(f"\0{_build_info.CORE}\0".encode()) == 1


@pytest.mark.parametrize("xla", [False, True])
def test_what_the_build_writes(xla):
    spec = importlib.util.spec_from_file_location("build", ROOT / "cc/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    cuda = build.Cuda("/bin/nvcc", "12.4", "/lib/x.a", ("80", "90"))
    for compiler in (None, cuda):
        written = {}
        libraries = {"2.15.1": False, "2.21.0-rc1": xla}
        exec(build.build_info("1.2.3", compiler, libraries), written)
        assert written["VERSION"] == "1.2.3"
        assert written["CORE"] == "libtf_deform_core-1.2.3.so"
        assert written["CUDA_VERSION"] == ("12.4" if compiler else None)
        names = "80;90" if compiler else None
        assert written["CUDA_ARCHITECTURES"] == names
        assert written["LIBRARIES"] == {
            "2.15": ("2.15.1", False),
            "2.21": ("2.21.0-rc1", xla),
        }
    exec(build.build_info("1.2.3", None, {}), written)
    assert written["LIBRARIES"] == {}
    assert build.ops_name("2.21.0-rc1") == "_ops_2.21.so"


def test_the_core_has_one_name_for_each_version():
    """Tests that a process may load the cores of two versions.

    Linkers take libraries of one name for the same.
    """
    assert re.fullmatch(
        rf"libtf_deform_core-{re.escape(tf_deform.__version__)}\.so",
        _build_info.CORE,
    )
    content = (PACKAGE / _build_info.CORE).read_bytes()
    assert content.count(f"\0{_build_info.CORE}\0".encode()) == 1
