"""The round loop, set-up and signals."""
