"""A human study on one's own machine: declared, asked, counted.

study.py what is asked, fixed before the first vote | answers.py the votes, one line each
plan.py what a study can show, before anybody votes | tally.py votes as arrays | rates.py win rates of majorities and votes
agreement.py raters with each other, with themselves, with a side; many models | figures.py all of it as one object
trust.py scorers beside the people | report.py votes.json and its pages | export.py votes as preference pairs
"""
