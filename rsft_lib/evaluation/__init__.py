"""Evaluation of a trained model: token losses before and after training, and the verification card."""
