"""Trainings: curves of one run, and comparisons of several."""
