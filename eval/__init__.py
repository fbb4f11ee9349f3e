"""Learned against linear: offline, closed loop, latency, report."""
