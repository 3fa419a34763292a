"""Training: gradient caching, the optimizer engines (plain torch and DeepSpeed ZeRO 0-3), checkpoints."""
