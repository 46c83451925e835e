"""What the sites agree on when they plan: sums, quantiles, a fingerprint, the digest of the plans."""
