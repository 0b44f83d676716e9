"""Errors, paths, registries, process groups, and the nouns that every package shares."""
