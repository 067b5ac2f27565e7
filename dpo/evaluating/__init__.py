"""Is it better? Images of several models on the same prompts and seeds: scored, compared, and put into one result.

sides.py      what is compared: images with their prompts and seeds, read from a folder; which belongs to which
scoring.py    a number for every image, from a scorer or a table
result.py     the statistics of all of it, as one JSON object (evaluation.json)
"""
