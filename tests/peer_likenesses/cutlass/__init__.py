"""Stands in for a package that an adapter wants to be there."""
