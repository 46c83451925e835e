"""Federated training compared with training alone and on pooled data."""
