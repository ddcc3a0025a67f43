"""Finished and running trainings: curves of one run, and several runs compared."""
