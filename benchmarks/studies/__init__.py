"""Experiments with a command line of their own: whole models, forces, accuracy on QM7b."""
