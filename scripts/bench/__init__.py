"""Programs that give figures of this machine; records and texts are in scripts/results."""
