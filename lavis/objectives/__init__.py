"""What is learned: losses, how they are counted, and what is exported."""
