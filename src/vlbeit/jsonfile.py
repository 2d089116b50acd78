"""JSON objects from files that somebody else may have written."""

import json
from pathlib import Path
from typing import Any

from vlbeit.errors import InputError

MAX_JSON = 256 << 20
"""Bytes of a JSON file that is read into memory."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path}: {path.stat().st_size} bytes, the limit is {MAX_JSON}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
