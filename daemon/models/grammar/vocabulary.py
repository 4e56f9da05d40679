"""The model's tokens as llguidance needs them, and grammars compiled for them.

A *matcher* is the state of one answer: it takes the tokens of the answer and says which may come next. Copies of a
matcher share what they have found out about the grammar, behind a lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from daemon.models.grammar.errors import GrammarError
from daemon.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_MESSAGE = 600  # characters of an error

# What one grammar may cost, in llguidance's units. They are a few times what large schemas of real use need: with the
# tokens of a vocabulary a mask takes at most about ten milliseconds, and the automaton some ten megabytes.
_MAX_ITEMS_IN_ROW = 2_000
_INITIAL_LEXER_FUEL = 1_000_000
_STEP_LEXER_FUEL = 200_000
_STEP_MAX_ITEMS = 50_000
_MAX_LEXER_STATES = 20_000
_MAX_GRAMMAR_SIZE = 200_000


class Vocabulary:
    """The tokens of one model. Building it takes some tenths of a second.

    `vocab_size`: of the model. Tokens that control the model are none of a text: a grammar must name them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Raises GrammarError if the model has no end-of-sequence token: then no answer could end."""
        from llguidance import LLParserLimits, LLTokenizer

        ends = [token for token in eos_token_ids if 0 <= token < vocab_size]
        if not ends:
            raise GrammarError("this model has no end-of-sequence token, so its output cannot be constrained")
        self.num_words = -(-vocab_size // 32)  # of a mask, 32 bits each
        tokens = _Tokens(tokenizer, vocab_size, ends)
        self.num_buffer_words = -(-len(tokens.tokens) // 32)  # of a buffer for a mask: its first words are the mask
        self._tokens = LLTokenizer(tokens, eos_token=ends)  # type: ignore[arg-type]
        tokens.greedy = self._tokens.greedy_tokenize
        self._limits = LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW,
            initial_lexer_fuel=_INITIAL_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the start of `grammar`, which is in llguidance's form. Raises GrammarError.

        Releases the GIL. A hostile grammar may take very long, or end the process: see `checker`.
        """
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        except BaseException as e:  # a panic of the library is no Exception
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise GrammarError(short(str(e))) from None
        if matcher.is_error():
            raise GrammarError(short(matcher.get_error()))
        return matcher


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self._complete()
        self.special_token_ids = sorted(t for t in {*tokenizer.marker_ids, *ends} if t < vocab_size)
        self._special = frozenset(self.special_token_ids)
        self._vocab_size = vocab_size
        self._encode = tokenizer.encode
        self.greedy = _no_tokens

    def _complete(self) -> None:
        """Append a token for each byte that the model has none for, from the next whole word of a mask on.

        llguidance expects one for every byte. Without it, a mask can allow a token that the grammar then refuses.
        """
        missing = {bytes([byte]) for byte in range(256)}.difference(self.tokens)
        if missing:
            self.tokens += [b""] * (-len(self.tokens) % 32) + sorted(missing)

    def __call__(self, text: str) -> list[int]:
        """Return tokens whose bytes are exactly `text`, if possible those that the model knows it by.

        A tokenizer may add a space or write special tokens: then the longest tokens that fit are as good.
        """
        found = self._encode(text, False)
        exact = self._special.isdisjoint(found) and max(found, default=0) < self._vocab_size
        if exact and b"".join([self.tokens[token] for token in found]) == text.encode():
            return found
        return self.greedy(text)


def _no_tokens(text: str) -> list[int]:
    return []


def short(message: str) -> str:
    """Return a message of llguidance without what is of no use to a client."""
    text = message.replace("<non-verbose/>", "").strip()
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
