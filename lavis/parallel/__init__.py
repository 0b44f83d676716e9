"""How a step is carried out over ranks, and what that costs."""
