"""Files that hold weights: Hugging Face's safetensors, megatron-core's `torch_dist`, Megatron-LM's older layout."""
