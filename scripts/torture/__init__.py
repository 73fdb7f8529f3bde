"""Programs that break a run on purpose, many times, and count what is lost."""
