# SPDX-License-Identifier: Apache-2.0
"""Writes the API pages from the docstrings, with pdoc.

    python docs/api.py build/docs

Every warning is an error, and the exit status then is not 0.
"""

import argparse
import pathlib
import warnings

import pdoc

import tf_deform


def write(folder: pathlib.Path) -> None:
    """Writes a page for each public module, and `index.html`.

    Raises:
        Warning: pdoc could not make sense of something.
    """
    # pdoc does not see names that are imported when they are used first.
    for name in tf_deform.__all__:
        setattr(tf_deform, name, getattr(tf_deform, name))
    # Sections that Keras has besides those of Google's style.
    pdoc.docstrings.GOOGLE_LIST_SECTIONS += ["Call arguments", "Weights"]
    pdoc.render.configure(
        docformat="google",
        search=False,
        template_directory=pathlib.Path(__file__).parent / "templates",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Modules that are called like the function in them are no pages.
        skipped = r"!tf_deform\.(ops|export)\."
        pdoc.pdoc("tf_deform", skipped, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="is made or replaced")
    write(parser.parse_args().folder)
