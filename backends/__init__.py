"""The built-in backends: one folder each, found by scanning this one. Nothing here imports any of them."""
