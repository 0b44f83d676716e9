"""Answers: caches, sampling, and the engine that decodes many at once."""
