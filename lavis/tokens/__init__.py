"""Tokenizers, chat templates and label masks."""
