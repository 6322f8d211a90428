"""What can be wrong with the user's data."""


class DataError(ValueError):
    """A mistake in the user's data. The message names file, row, field and fix."""


class BadRowError(DataError):
    """One row cannot be used; with data.on_bad_row: skip it is left out and counted instead."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
