"""The model store: everything that turns a model name into one Hugging Face directory, and text into tokens."""
