"""GGUF files (llama.cpp): read as a model folder is, and written from one."""
