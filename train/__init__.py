"""Distil generators, train and calibrate their gates, export."""
