"""Runner that plays a written script. It is for tests of protocols: clients get answers that are known beforehand.

The script is a JSON file, a list of ``{"when": regular expression, "say": text}``. The first entry that is found in
the text of a prompt, special tokens included, is the answer; without `when` it fits every prompt. The position alone
decides which token comes next, so an answer goes on after a preemption, a move or the death of an engine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from daemon.config import ConfigError
from daemon.engine.fake.stub import StubRunner, certain_logprobs, certain_prompt_logprobs
from daemon.engine.request import Request
from daemon.engine.runner import StepPlan, StepResult
from daemon.models.tokenizer import Tokenizer

UNWRITTEN = "The script has no answer to this prompt."


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer, and the prompts that get it."""

    say: str
    when: str = ""


class Script(NamedTuple):
    entries: list[tuple[re.Pattern[str], str]]
    digest: bytes  # of the file: engines with different scripts cannot go on with each other's answers

    def answer(self, prompt: str) -> str:
        """Return what the script says to `prompt`; UNWRITTEN if nothing in it fits."""
        return next((say for when, say in self.entries if when.search(prompt)), UNWRITTEN)


def read_script(path: Path) -> Script:
    """Read the file of a script. Raises ConfigError if it is none."""
    try:
        data = path.read_bytes()
        entries = msgspec.json.decode(data, type=list[Entry])
        patterns = [(re.compile(entry.when, re.DOTALL), entry.say) for entry in entries]
    except OSError as e:
        raise ConfigError(f"script: cannot read {path}: {e.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        form = '[{"when": "regular expression", "say": "text"}, ...]'
        raise ConfigError(f"script: {path} must be JSON of the form {form}: {e}") from None
    except re.error as e:
        raise ConfigError(
            f"script: {path} has a `when` that is not a regular expression: {e.pattern!r}: {e}"
        ) from None
    return Script(patterns, blake2b(data, digest_size=8).digest())


class ScriptRunner(StubRunner):
    """Samples the tokens of the script's answer, then the end token. Uses no KV, and ignores grammars."""

    device = "script"

    def __init__(
        self,
        script: Script,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        *,
        step_seconds: float,
        vocab_size: int,
        max_model_len: int,
        block_size: int = 16,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`eos_token_ids`: at least one."""
        super().__init__(
            step_seconds=step_seconds,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=block_size,
            sleep=sleep,
        )
        self.eos_token_ids = tuple(eos_token_ids)
        self.script = script
        self._tokenizer = tokenizer
        self._answers: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def execute(self, plan: StepPlan) -> StepResult:
        self.wait()
        tokens = [self._token(row.request, row.start + row.count) for row in plan.rows if row.sample]
        return StepResult(tokens, certain_logprobs(plan, tokens), prompt_logprobs=certain_prompt_logprobs(plan))

    def _token(self, request: Request, position: int) -> int:
        answer = self._answers.get(request)
        if answer is None:
            prompt = b"".join(map(self._tokenizer.token_bytes, request.tokens[: request.prompt_len]))
            said = self.script.answer(prompt.decode("utf-8", "replace"))
            answer = self._answers[request] = self._tokenizer.encode(said, False)
        index = position - request.prompt_len
        return answer[index] if index < len(answer) else self.eos_token_ids[0]
