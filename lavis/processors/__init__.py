"""Images to tensors, and the small normalisations of text."""
