"""The mathematics of the federated methods: pure torch, no input or output."""
