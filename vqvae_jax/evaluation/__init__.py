SHOWN = 60
"""Slices in a report if not said otherwise: with 256 x 128 pixels each, the page stays under 5 MB."""
