"""Stands in for FlashInfer 0.7: its prefill of the gated delta rule, on the eager backend."""
