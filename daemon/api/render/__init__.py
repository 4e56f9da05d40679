"""From the parts of an answer to the bytes of each API: answers, choices, and one renderer for each API."""
