"""Recipes: reading, checking and documenting them."""
