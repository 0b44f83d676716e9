"""Folders of transformers models that a Vlm equals: read and written."""
