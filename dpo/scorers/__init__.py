"""Scorers of images, and what their numbers mean.

scorer.py     the interface, the list of scorers (--scorers help), and from a name to a scorer
cache.py      scores that were computed before, by image, scorer and caption
compare.py    the statistics: paired differences, win rates, intervals
"""
