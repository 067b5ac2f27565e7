"""A human study on one's own machine: declared, asked, counted.

study.py what is asked, fixed before the first vote | answers.py the votes, one line each
"""
