"""What travels between silos, and how many bytes it was."""
