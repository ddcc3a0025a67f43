"""What a trained model does: its answers in both modes, and the loss of single tokens."""
