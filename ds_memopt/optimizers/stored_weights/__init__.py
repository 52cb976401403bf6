"""What the methods share that update the stored weights themselves, without an engine's fp32 masters."""
