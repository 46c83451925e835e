"""What sites and coordinator exchange: collectives, payloads, means, uploads, and the list of what left a site."""
