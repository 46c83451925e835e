"""What only GCML's trainer needs."""
