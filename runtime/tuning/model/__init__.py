"""What is done to the base model: LoRA and how it starts, sharding, packed attention, fused operations."""
