"""Annotation rows to packed batches: formats, template, preparation, sampling, collation."""
