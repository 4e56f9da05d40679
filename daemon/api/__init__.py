"""The frontend: OpenAI routes, SSE, admission, request tracking, metrics."""
