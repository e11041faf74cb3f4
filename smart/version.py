"""The version of the training package."""

__version__ = "0.1.0"
