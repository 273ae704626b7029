"""Hazard rules: facts of a program in, findings out. One module for each family of rules."""
