"""Talking with a model: terminal, web page, API."""
