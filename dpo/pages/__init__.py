"""What a person reads afterwards, made from a folder alone.

folder.py the files of a run, and reading them back; kinds.py what stands in them; began.py what a run began with
figures.py every figure: name, words, format
verdict.py what the figures mean | charts.py, plots.py the charts | report.py report.html | card.py the model card
<<<<<<< HEAD
sweep.py the comparison of a sweep | evaluation.py, evaluation.html, evaluation.md: is it better? better.py in words
labels.py, labels.html the page of a labelled set
votes.py, votes.html, vote_tables.py what people prefer | markdown.py tables of Markdown
=======
sweep.py the comparison of a sweep | evaluation.py, evaluation.html, evaluation.md: is it better?
votes.py, votes.html, vote_tables.py what people prefer | markdown.py tables of Markdown
labels.py, labels.html the page of a labelled set
>>>>>>> count
"""
