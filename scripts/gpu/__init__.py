"""What runs on a host with an NVIDIA GPU: the suite of checks and timings, and the tuner."""
