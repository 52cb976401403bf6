"""What a run reads: text to pre-train on, rows to fine-tune on."""
