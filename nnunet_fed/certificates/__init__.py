"""Certificates of a federation: an authority, X.509, and the list of those that are denied."""
