"""The error of everything that reads or writes a model."""


class ConvertError(ValueError):
    """A model folder, a checkpoint or a layout that cannot be used. One line: what, where, and the fix."""
