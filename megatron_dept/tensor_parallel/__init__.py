"""Layers and vocabularies split over the tensor-parallel ranks of a silo."""
