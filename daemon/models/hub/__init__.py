"""Models by their name on a hub that speaks the protocol of the Hugging Face hub."""
