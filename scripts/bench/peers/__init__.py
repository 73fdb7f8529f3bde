"""One training step of ours, PEFT's and qwix's, each for a Python of its own."""
