"""A human study on one's own machine: declared, asked, counted.

study.py what is asked, fixed before the first vote | answers.py the votes, one line each
declare.py from folders of images to a study | presets.py the published studies | checks.py items that show whether a rater looks
asking.py which question comes next | desk.py a study in progress | raters.py names and keys | shown.py images as raters see them
server.py and page.html the page on this machine
plan.py what a study can show, before anybody votes | tally.py votes as arrays | rates.py win rates of majorities and votes
agreement.py raters with each other, with themselves, with a side; many models | figures.py all of it as one object
trust.py scorers beside the people | report.py votes.json and its pages | export.py votes as preference pairs
"""
