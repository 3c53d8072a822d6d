"""Flower's quickstart-pytorch on scikit-learn's digits, with Urna's secure sum."""
