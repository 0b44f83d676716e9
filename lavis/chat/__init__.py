"""Chatting with a trained model: one engine and one session behind the terminal, the web page and the API."""
