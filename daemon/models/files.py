"""The JSON files of a model directory, and the error of a model that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """The model cannot be served. The message says why and what the user can do."""


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in `file`, or None if the file does not exist. Raises ModelError for anything else."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ModelError(f"cannot read {file}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file} is not valid JSON ({e}); copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object")
    return value


def gigabytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e9:.2f} GB"
