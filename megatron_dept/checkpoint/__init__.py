"""State by name: saved on any layout, loaded on any other."""
