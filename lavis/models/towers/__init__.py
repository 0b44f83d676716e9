"""Vision towers: pixels to vectors."""
