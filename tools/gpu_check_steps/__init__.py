"""The parts of tools/gpu_check.py: standard library alone, since it runs before anything is installed."""
