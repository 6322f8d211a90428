"""Parsing of engines' answers, which have a list for every token."""

import gc
from typing import Any

import orjson


def parse_json(text: str) -> Any:
    """The value, without garbage collections meanwhile. Raises ValueError.

    The collector looks at all lists made so far whenever some hundred more were made, and finds nothing to collect: that takes
    half as long as parsing does. orjson takes 0.4 of json's time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(text)
    finally:
        if was_enabled:
            gc.enable()
