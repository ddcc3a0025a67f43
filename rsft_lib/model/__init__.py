"""The model: a Hugging Face config as a megatron-core GPTModel, and the names of its weights."""
