"""Grammars that constrain an answer: their sources, the vocabulary that they select from, and a safe compilation."""
