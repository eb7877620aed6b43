"""Finished trainings of one base, side by side."""
