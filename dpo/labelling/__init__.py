"""Preferences from scores: the work of the label command.

work.py from what is asked for (asked.py) to a folder of labelled pairs (folder.py): items.py the images, of pairs or drawn;
votes.py a number for each by all scorers, scores.py by one; dpo/pairing/choose.py which images are paired; scale.py scores ->
differences -> probabilities; written.py pairs -> files; summary.py what was made, in figures and as a page
"""
