"""The coordinator's end: its services, its HTTP pages and its metrics."""
