"""Sample images (draw.py), what they take of a GPU's memory (memory.py), and the PNG grid that shows them (grid.py)."""
