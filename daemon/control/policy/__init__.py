"""Pure decisions: freeness, dispatch, rebalancing, scaling, ownership, priority. No clock, no I/O, no torch."""
