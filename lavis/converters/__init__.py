"""Between checkpoint dialects: what was trained here for other programs, and the other way round."""
