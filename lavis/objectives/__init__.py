"""What is learned: losses over hidden states, and by what they are divided."""
