"""A TOML file of options."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from daemon.option import ConfigError


def read_toml(file: Path) -> dict[str, Any]:
    """Return the values of a TOML file. Raises ConfigError, which says why it cannot be read."""
    try:
        return tomllib.loads(file.read_text())
    except OSError as e:
        raise ConfigError(f"cannot read {file}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not valid TOML: it is not UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{file} is not valid TOML: {e}") from None
    except (ValueError, RecursionError):  # tomllib gives up on numbers of thousands of digits and on deep nesting
        raise ConfigError(f"{file} is not valid TOML: it has a value that is too long or too deeply nested") from None
