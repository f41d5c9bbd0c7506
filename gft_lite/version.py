"""The version of the package, which the wheel's metadata is built from."""

__version__ = "0.1.0"
