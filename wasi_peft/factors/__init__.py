"""Preparation: data in, forms out."""
