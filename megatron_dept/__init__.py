"""Language-model pre-training with decoupled embeddings (DEPT, arXiv 2410.05021) on DeepSpeed."""

__version__ = "0.1.0"
