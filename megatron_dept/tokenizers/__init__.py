"""Text to ids and back, one interface for every tokenizer."""
