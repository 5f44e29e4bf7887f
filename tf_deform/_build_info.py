"""Written by setup.py."""

VERSION = "0.1.0"
TENSORFLOW_VERSION = "2.21.0"
