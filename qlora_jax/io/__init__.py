"""Reading and writing: safetensors, Hugging Face folders, bitsandbytes, adapters."""
