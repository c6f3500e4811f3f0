"""Nearest neighbours, exact and through an index."""
