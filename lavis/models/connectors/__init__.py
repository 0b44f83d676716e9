"""Connectors: a tower's vectors to inputs of the LLM."""
