"""Prediction with what a study has trained."""
