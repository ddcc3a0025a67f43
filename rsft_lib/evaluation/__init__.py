"""Evaluation of a trained model: answers by mode, and token losses."""
