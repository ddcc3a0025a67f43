"""Weights between Hugging Face folders and megatron-core `torch_dist` checkpoints."""
