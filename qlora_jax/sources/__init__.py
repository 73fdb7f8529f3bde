"""What a base is read from, opened once: folders, GGUF files, the hub; and saving one."""
