"""Settings for all tests."""

import os

from hypothesis import settings

# A landing must not hang on luck: there the examples are the same each time. At a desk they differ.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
