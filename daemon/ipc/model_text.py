"""The text files of the model: what all processes of a daemon must agree on besides the weights.

Weights can be replaced one engine at a time, because each request ends on those it began with. A frontend's tokenizer
and an engine's architecture cannot: a process that starts compares the files with those that the daemon began with.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

CHANGED = (
    "config.json, the tokenizer or the chat template in {} has changed since llumd started. Weights can be replaced "
    "while it runs, these files cannot: restart the whole daemon, or put the old files back"
)
_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"


def text_digest(model_dir: str) -> str:
    """Return a digest of the text files of a model directory, in hex. A file that is missing counts as empty.

    Raises OSError for a file that cannot be read.
    """
    digest = blake2b(digest_size=16)
    directory = Path(model_dir)
    for file in [*(directory / name for name in _FILES), *sorted(directory.glob(_MORE_TEMPLATES))]:
        try:
            content = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        digest.update(b"%d " % len(content) + content)
    return digest.hexdigest()
