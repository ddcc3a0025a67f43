"""The loss of single tokens before and after a training."""
