"""Sample images (draw.py), and the PNG grid that shows them (grid.py)."""
