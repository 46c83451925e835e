"""Adapter to nnU-Net's planning: one fingerprint and one set of plans for all sites."""
