"""The Hugging Face format: architectures, weights and conversion, without Megatron."""
