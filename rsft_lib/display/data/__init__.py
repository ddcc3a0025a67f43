"""A dataset: origin of its records, sample lengths, and the cost of length settings."""
