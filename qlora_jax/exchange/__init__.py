"""Adapters on disk: ours (Orbax), and PEFT's."""
