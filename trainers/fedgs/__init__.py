"""What only FedGS's trainer needs."""
