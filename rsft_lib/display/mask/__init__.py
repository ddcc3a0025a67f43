"""Samples as they will be trained: segments, token text, and packs."""
