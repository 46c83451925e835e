"""Adapter to the network: the coordinator and its sites on gRPC."""
