"""JSON of files that anybody may have written."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """json.loads, which raises ValueError for whatever it cannot read: also for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
