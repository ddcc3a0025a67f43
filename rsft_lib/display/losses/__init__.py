"""Token losses before and after a training."""
