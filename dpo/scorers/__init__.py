"""What gives images numbers, and what the numbers of two models say.

An image and a caption: pickscore.py and clip.py (both on towers.py),
imagereward.py. A whole set (sets.py has the interface): inception.py, diversity.py. Statistics:
compare.py. Shared: pixels.py (preprocessing) and published.py (converted weights); assets/ has the Inception Score's classes.
"""
