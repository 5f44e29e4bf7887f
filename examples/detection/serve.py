# SPDX-License-Identifier: Apache-2.0
"""Detects objects in image files with an exported model.

    python examples/detection/serve.py runs/detection/saved_model photo.jpg ...

It prints, for each file, the boxes in the file's own pixels as JSON. The
process reads nothing of the model but its folder.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import tf_deform  # noqa: F401  It registers the ops that the model calls.


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Detect objects in JPEG and PNG files."
    )
    parser.add_argument(
        "saved_model", type=pathlib.Path, help="folder of the exported model"
    )
    parser.add_argument("images", type=pathlib.Path, nargs="+")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file to write instead"
    )
    args = parser.parse_args()
    if not (args.saved_model / "saved_model.pb").exists():
        parser.error(
            f"Expected the folder of a SavedModel. Received: {args.saved_model}"
        )
    model = tf.saved_model.load(args.saved_model)
    answers = {}
    for path in args.images:
        # Reads files one by one, so that an error names its file.
        try:
            found = model.serve(tf.constant([path.read_bytes()]))
        except (OSError, tf.errors.InvalidArgumentError) as error:
            reason = getattr(error, "message", str(error)).splitlines()[0]
            sys.exit(
                "error: Expected a JPEG or PNG file. Received: "
                f"{path} ({reason})"
            )
        found = {name: value.numpy()[0] for name, value in found.items()}
        count = found.pop("valid")
        answers[str(path)] = [
            {
                "box": found["boxes"][i].tolist(),
                "score": float(found["scores"][i]),
                "class_id": int(found["class_ids"][i]),
                "label": found["labels"][i].decode(),
            }
            for i in range(count)
        ]
    text = json.dumps(answers, indent=2)
    if args.out is None:
        print(text)
    else:
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text(text + "\n")
        partial.replace(args.out)


if __name__ == "__main__":
    main()
