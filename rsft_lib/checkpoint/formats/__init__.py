"""Weight file formats: Hugging Face's safetensors, megatron-core's `torch_dist`, Megatron-LM's older layout."""
