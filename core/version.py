"""The version that this service reports."""

from importlib.metadata import version

VERSION = version("shadowft")
