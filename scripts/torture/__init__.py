"""Programs that damage inputs and runs on purpose, and count what comes of it."""
