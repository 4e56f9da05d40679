"""What a frontend loads of a model, the tokenizer and the chat template, and the check of both before the start.

The check loads them as a frontend does, in a process of its own: the supervisor needs no memory for them, and a
library that panics, crashes or never ends on a damaged file ends only the check.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from daemon.models.chat_template import ChatTemplate
from daemon.models.model_config import ModelError
from daemon.models.module_process import start_module
from daemon.models.tokenizer import Tokenizer

_TIMEOUT = 120.0  # seconds; the largest tokenizers load in a few
_REFUSED = 78  # exit code of the check when its output is the error


class TextFiles(NamedTuple):
    """The tokenizer and the chat template of a model."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate


def load_text_files(path: Path) -> TextFiles:
    """Load both from a Hugging Face directory. Raises ModelError for every file that cannot be used."""
    try:
        return TextFiles(Tokenizer(path), ChatTemplate(path))
    except ModelError:
        raise
    except Exception as e:
        why = f"{type(e).__name__}: {e}"
        raise ModelError(f"{path}: the tokenizer or the chat template cannot be loaded ({why})") from e


@contextmanager
def checked(path: Path) -> Iterator[None]:
    """Load the text files of `path` in another process while the body of the `with` statement runs.

    Raises ModelError at its end if they cannot be used.
    """
    with start_module(__name__, str(path)) as check:
        try:
            yield
            out, err = check.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            why = f"loading the tokenizer and the chat template took longer than {_TIMEOUT:.0f} s"
            raise ModelError(f"{path}: {why}") from None
        finally:
            check.kill()  # no effect once it has ended
    if check.returncode == _REFUSED and out:
        raise ModelError(out.strip())
    if check.returncode:
        last = (err.strip().splitlines() or [f"exit code {check.returncode}"])[-1]
        raise ModelError(f"{path}: the tokenizer or the chat template cannot be loaded ({last})")


def _main() -> int:
    try:
        load_text_files(Path(sys.argv[1]))
    except ModelError as e:
        sys.stdout.buffer.write(str(e).encode("utf-8", "surrogateescape"))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
