"""Speed and memory of every operator against other implementations, answers checked first."""
