"""Tasks: what is trained, on which data, and how it is judged. The loop is in lavis/runners."""
