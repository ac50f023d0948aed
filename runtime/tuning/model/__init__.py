"""What is done to the base model: LoRA, its start, sharding, and fused operations."""
