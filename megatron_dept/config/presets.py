"""Model sizes by name: the paper's three (DEPT, table of hyper-parameters) and a tiny one for a laptop."""

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128},
    "dept-125m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 2048},
    "dept-350m": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 2048},
    "dept-1.3b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "seq_length": 2048},
}
