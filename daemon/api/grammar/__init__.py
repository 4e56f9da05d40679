"""From the fields of a request to the grammar that constrains its answer."""
