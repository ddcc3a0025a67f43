"""Conversion of weights between Hugging Face folders and megatron-core checkpoints."""
