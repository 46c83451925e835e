"""What only FedSM's trainer needs."""
