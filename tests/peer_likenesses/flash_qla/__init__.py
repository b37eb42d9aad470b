"""Stands in for FlashQLA 0.1.3: its low-level functions, on the eager backend."""
