"""Annotation rows to packed batches: dialects, preparation, order, images."""
