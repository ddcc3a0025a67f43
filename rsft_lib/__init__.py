"""Supervised fine-tuning of reasoning models into hybrid ones, on megatron-core."""
