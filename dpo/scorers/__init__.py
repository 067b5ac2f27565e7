"""What gives images numbers, and what the numbers of two models say (compare.py)."""
