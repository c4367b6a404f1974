"""A JSON file from outside that holds an object."""

import json
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError


def read_object(path: Path, kind: type[SurgeonError]) -> dict[str, Any]:
    """Raises `kind` for a file that cannot be read, and for one that does not hold a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path}: cannot read it: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise kind(f"{path} holds a JSON {type(content).__name__} where an object is expected")
    return content
