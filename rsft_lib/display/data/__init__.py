"""A dataset: what became of its records, their lengths, and what each choice of length costs."""
