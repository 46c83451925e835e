"""Adapter to nnU-Net's training: federated trainers for the stock command ``nnUNetv2_train``."""
