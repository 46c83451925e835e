"""Certificates of a federation: an authority, X.509, and the list of those that are denied."""

AUTHORITY_DAYS = 3653
"""For how long an authority is valid unless it is told otherwise: ten years."""
SITE_DAYS = 396
"""The same of a site's certificate. Thirteen months: renewed once a year, with a month to spare."""
LONGEST_DAYS = 36525
"""No certificate is valid for longer."""
