"""Perplexity and bits per byte on held-out text."""
