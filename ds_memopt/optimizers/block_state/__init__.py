"""What the methods share whose state has one entry per block or element, on an engine's fp32 masters."""
