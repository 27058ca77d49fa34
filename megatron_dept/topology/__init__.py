"""Pure arithmetic on ranks; no torch."""
