"""What gives images numbers, and what the numbers of two models say.

scorer.py has the interface, the list, and opens a scorer by its name; own.py is a user's own; cache.py keeps scores and
features. An image and a caption: pickscore.py, clip.py, hpsv2.py and aesthetic.py (on towers.py), imagereward.py. A whole
set (sets.py has the interface): inception.py, diversity.py. Statistics: compare.py. Shared: pixels.py (preprocessing),
published.py (converted weights), convert.py (from a pickle, once).
"""
