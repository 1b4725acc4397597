"""Data: formats → clean → split → template and mask → pack → Arrow. Knows nothing of engines and ranks."""
