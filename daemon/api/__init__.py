"""The frontend process: OpenAI routes, SSE, admission, request tracking, metrics."""
