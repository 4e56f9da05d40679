"""OpenAI's Responses API, without stored responses: each request is a whole conversation."""
