"""A run as a folder: checkpoints, metrics, report."""
