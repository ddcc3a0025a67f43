"""A training while it runs: a card that is rewritten, and a button that stops it."""
