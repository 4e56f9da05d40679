"""Conversion of a GGUF file to a Hugging Face directory."""
