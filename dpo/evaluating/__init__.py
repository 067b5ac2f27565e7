"""Is it better? Images of several models on the same prompts and seeds: scored, compared, and put into one result.

work.py       from what a user asks for to evaluation.json and its pages
sides.py      what is compared: images with their prompts and seeds, read from a folder; which belongs to which
asked.py      what is asked for, and whether it can be done
flags.py      words of a command line that name sides, scorers and tables
tables.py     prompts and scores that other programs wrote
scoring.py    a number for every image, from a scorer or a table; features of every image
sets.py       a number for all images of a side together
result.py     the statistics of all of it, as one JSON object (evaluation.json)
provenance.py whose labels a model was trained on
accuracy.py   implicit preference accuracy on labelled pairs
reproduce.py  published tables (published.toml) beside one's own figures
"""
