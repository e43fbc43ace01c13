"""One stage, and one shard's chain of stages."""
