"""What both ends of a connection need."""
