"""What leaves the program: exports and conversions between checkpoint dialects."""
