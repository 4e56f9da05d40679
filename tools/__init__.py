"""Programs for the development of llumd. They are not part of the package."""
