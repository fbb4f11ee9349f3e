"""Training a VLA of OpenVLA's class from scratch: frames, network, loss terms, Lightning module."""
