"""Stands in for FLA 0.6.0: its low-level functions of the delta rules, and its dispatch, on the eager backend."""
