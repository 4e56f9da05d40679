"""Programs for the people who develop llumd; none of them ships."""
