"""Body, embedding and loss."""
