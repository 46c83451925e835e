"""Data sets: splitting one among sites, and a phantom."""
