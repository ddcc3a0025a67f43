"""The model: a megatron-core GPTModel built from a Hugging Face config, and the mapping of weight names."""
