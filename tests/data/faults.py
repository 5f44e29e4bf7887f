# SPDX-License-Identifier: Apache-2.0
"""What is expected of a data set with a fault, and the check of it."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
from small_sets import SIZES, WRITERS

from tf_deform import data


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault and its answer.

    Attributes:
        name: What is odd or broken.
        forms: The forms that are tried, separated by blanks.
        make: Puts the fault into a sound data set. May return another source.
        answer: "kept": read, and the notes say `says`; "broken": refused, the
            message says `says`, but left out with skip_broken; "refused":
            refused also with skip_broken.
        says: A regular expression.
        options: Of `read`.
        check: Called with the photographs by name, if the set is read.
    """

    name: str
    forms: str
    make: Callable
    answer: str
    says: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    check: Callable | None = None


def rows(faults):
    return [
        pytest.param(form, fault, id=f"{form}-{fault.name}".replace(" ", "_"))
        for fault in faults
        for form in fault.forms.split()
    ]


def sound(annotations):
    """Checks what holds for every reading. Returns photographs by name."""
    for photograph in annotations.photographs:
        limits = [photograph.width, photograph.height] * 2
        boxes = photograph.boxes
        assert boxes.dtype == np.float32 and np.isfinite(boxes).all()
        assert (boxes >= 0).all() and (boxes <= limits).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert photograph.labels.dtype == np.int32
        assert np.isin(
            photograph.labels, np.arange(len(annotations.classes))
        ).all()
        image = data.read_image(photograph.path)
        assert image.shape == (photograph.height, photograph.width, 3)
        assert image.dtype == np.uint8
        if photograph.mask is not None:
            mask = data.read_mask(photograph.mask)
            assert mask.shape == (photograph.height, photograph.width, 1)
    return {
        photograph.path.rsplit("/", 1)[-1].split(".")[0].lower(): photograph
        for photograph in annotations.photographs
    }


def check(form, fault, root):
    source = WRITERS[form](root)
    source = fault.make(root, form) or source

    def read(**more):
        return data.read(source, **fault.options, **more)

    if fault.answer == "kept":
        result = read()
        notes = "\n".join(result.notes)
        assert re.search(fault.says, notes), notes
        found = sound(result)
        if fault.check is None:
            assert found.keys() >= SIZES.keys()
        else:
            fault.check(found)
        return
    with pytest.raises((ValueError, OSError)) as error:
        read()
    message = str(error.value)
    assert "Expected" in message and "Received" in message
    assert re.search(fault.says, message, re.DOTALL), message
    if fault.answer == "refused":
        with pytest.raises((ValueError, OSError)):
            read(skip_broken=True)
        return
    result = read(skip_broken=True)
    notes = "\n".join(result.notes)
    assert re.search("broken and left out: .*" + fault.says, notes), notes
    assert sound(result).keys() == {"b", "c"}
