"""Both ends of a connection between two sites."""
