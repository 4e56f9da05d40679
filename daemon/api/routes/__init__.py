"""How a request finds its handler, and the routes that answer no completion."""
