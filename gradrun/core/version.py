"""The version of this package; hatch reads it when it builds the wheel."""

__version__ = "0.1.0"
