"""Layers and functions cut over a silo's tensor ranks."""
