"""Parsing of engines' answers, which have a list for every token."""

import gc
import json
from typing import Any


def parse_json(text: str) -> Any:
    """json.loads without garbage collections meanwhile. Raises ValueError.

    The collector looks at all lists made so far whenever some hundred more were made, and finds nothing to collect: that takes
    several times as long as parsing does.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text)
    finally:
        if was_enabled:
            gc.enable()
