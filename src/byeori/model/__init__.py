"""Weights, attention, adapters, processes."""
