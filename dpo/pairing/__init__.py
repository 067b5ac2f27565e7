"""Preferences from a person's rankings: the work of the pairs command, and which images are paired at all.

work.py from what is asked for (asked.py) to a folder of pairs (folder.py), or to a look at a set that is there:
columns.py which column holds what, and which end of it is better; rankings.py tables, and folders by stars -> images with a
number; matches.py who won against whom -> strengths; ranked.py what all of these give; choose.py which images are paired;
written.py pairs -> files; look.py what is in the images of a set; warn.py what a person should know before a run, singles.py of
images without partners; shown.py the sheet and the page
"""
