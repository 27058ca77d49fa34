"""Indexed datasets, sampling order, vocabularies of sources."""
