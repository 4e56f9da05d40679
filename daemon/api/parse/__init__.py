"""From the text of a choice to its parts: what is text, what is reasoning, what is a tool call. Pure."""
