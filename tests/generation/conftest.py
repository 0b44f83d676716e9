"""The shapes model that is included, its engine, and pictures of the shapes world."""

from tests.serve.conftest import chat, engine, pictures

__all__ = ["chat", "engine", "pictures"]
