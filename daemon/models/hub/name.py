"""The name of a model on the hub, as a user writes it. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

DEFAULT_REVISION = "main"
_NAME = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./+-]*))?(?::(?P<file>[\w][\w./+-]*))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REPO = 96  # characters; a rule of the hub


class HubName(NamedTuple):
    """A model on the hub: `ORG/NAME`, `ORG/NAME@REVISION` or `ORG/NAME[@REVISION]:GGUF`."""

    repo: str  # ORG/NAME
    revision: str = DEFAULT_REVISION  # a branch, a tag or a commit
    gguf: str = ""  # name of a .gguf file or the quantisation in its name; "": the repository is a model directory

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.gguf}" if self.gguf else "")

    @property
    def is_commit(self) -> bool:
        """True if the revision is a whole commit id, which never changes its content."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_name(text: str) -> HubName | None:
    """Return the name that `text` is, or None if it has not the form of one."""
    match = _NAME.fullmatch(text)
    if not match or ".." in text or "//" in text or text.endswith((".", "/")):
        return None
    repo = match["repo"]
    if "--" in repo or len(repo) > _MAX_REPO or repo.endswith((".git", ".gguf", ".", "-")):
        return None
    return HubName(repo, match["revision"] or DEFAULT_REVISION, match["file"] or "")
