"""Models, written as single-device code: nothing here knows process groups, DeepSpeed or text."""
