"""Paths of other servers' APIs that this one knows only to say why it does not serve them. Pure."""

from __future__ import annotations

from daemon.api.errors import ApiError

_GENERATES = "The model that is served here generates text"
_EMBEDS = f"{_GENERATES}, and has no embeddings. Run an embedding model in another server."
_JUDGES = f"{_GENERATES}, and does not score or classify pairs of texts. Run a model for this in another server."
_TEXT = f"{_GENERATES}. Audio, images and video are neither read nor made."
_STATELESS = "This server keeps no files, conversations or jobs. Send each request with all that it needs."
_FIXED = "This server does not train. Start llumd with the model that you have trained."
_ADMIN = "The daemon is controlled at its admin socket: see `llumctl --help`."

_REASONS = {
    "embeddings": _EMBEDS,
    "embed": _EMBEDS,
    "api/embed": _EMBEDS,
    "api/embeddings": _EMBEDS,
    "pooling": _EMBEDS,
    "rerank": _JUDGES,
    "v2/rerank": _JUDGES,
    "score": _JUDGES,
    "classify": _JUDGES,
    "moderations": "This server does not moderate. Check input and output yourself.",
    "audio": _TEXT,
    "images": _TEXT,
    "videos": _TEXT,
    "realtime": _TEXT,
    "files": _STATELESS,
    "uploads": _STATELESS,
    "batches": f'{_STATELESS} Requests of a batch can be sent at once with `"priority": "low"`.',
    "messages/batches": f'{_STATELESS} Requests of a batch can be sent at once with `"priority": "low"`.',
    "assistants": _STATELESS,
    "threads": _STATELESS,
    "conversations": _STATELESS,
    "vector_stores": _STATELESS,
    "containers": _STATELESS,
    "evals": _STATELESS,
    "chat/completions": "This server stores no answers.",
    "responses": "This server stores no responses. Send the whole conversation in `input`.",
    "fine_tuning": _FIXED,
    "load_lora_adapter": "Adapters are not supported. Serve the merged model.",
    "unload_lora_adapter": "Adapters are not supported. Serve the merged model.",
    "pause": _ADMIN,
    "resume": _ADMIN,
    "sleep": _ADMIN,
    "wake_up": _ADMIN,
    "reset_prefix_cache": _ADMIN,
    "api/chat": "This is a path of Ollama's own API. Use `/v1/chat/completions`.",
    "api/generate": "This is a path of Ollama's own API. Use `/v1/completions`.",
    "api/tags": "This is a path of Ollama's own API. Use `/v1/models`.",
    "api/show": "This is a path of Ollama's own API. Use `/v1/models`.",
    "generate": "This is a path of another server's own API. Use `/v1/completions`.",
    "completion": "This is a path of llama.cpp's own API. Use `/v1/completions`.",
    "inference/v1/generate": "This is a path of vLLM's own API. Use `/v1/completions`.",
    "invocations": "This is a path of SageMaker's API. Use `/v1/chat/completions`.",
}
_LONGEST = max(name.count("/") for name in _REASONS) + 1


def unknown_url(path: str) -> ApiError:
    """Return the error (404) for a path without a route, with the reason if it is one of another server."""
    parts = [part for part in path.split("/") if part]
    while parts[:1] in (["openai"], ["v1"]):
        del parts[0]
    # Behind the `deployments` of Azure is a model, which may contain slashes, then the path.
    starts = range(2, len(parts)) if parts[:1] == ["deployments"] else range(1)
    for start in starts:
        for end in range(min(_LONGEST, len(parts) - start), 0, -1):
            if (reason := _REASONS.get("/".join(parts[start : start + end]))) is not None:
                return ApiError(404, f"This server does not have `{path[:100]}`. {reason}", code="unsupported_url")
    message = f"This server has no path `{path[:100]}`. Its paths are listed at /openapi.json."
    return ApiError(404, message, code="unknown_url")
