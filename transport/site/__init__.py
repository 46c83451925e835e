"""A site's end towards the coordinator."""
