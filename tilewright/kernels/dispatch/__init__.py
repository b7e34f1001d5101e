"""From the call of an operator to what serves it: problems, the router, cards, and what is remembered between calls."""
