"""Anthropic's Messages API: each request is a whole conversation, and becomes a chat."""
