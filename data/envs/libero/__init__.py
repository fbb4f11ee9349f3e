"""LIBERO and LIBERO-PRO: tasks, scenes, the simulation, images, and a scripted expert."""
