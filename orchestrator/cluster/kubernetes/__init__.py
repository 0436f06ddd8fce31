"""Runs as objects of Kubernetes."""
