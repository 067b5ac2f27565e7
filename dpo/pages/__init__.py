"""What a person reads afterwards, made from a folder alone.

folder.py the files of a run, and reading them back; kinds.py what stands in them; began.py what a run began with
standing.py of which update its result is, beside where the run stands
origin.py what of that may be published, and its licence
figures.py every figure: name, words, format; kept.py which of them are of the result; single.py words of images alone
verdict.py what the figures mean | aligned.py what came of a run, in a few values
charts.py, plots.py the charts | report.py report.html | card.py the model card
afterwards.py what to do with a run that has ended
sweep.py the comparison of a sweep | evaluation.py, evaluation.html, evaluation.md: is it better? better.py in words
replay.py, replay.html the page of a replayed update | spikes.py updates that stand out
votes.py, votes.html, vote_tables.py what people prefer | labels.py, labels.html the page of a labelled set
pairs.py, pairs.html the page of any set of pairs: chosen beside rejected
head.html, tiles.html, cells.html, verdicts.html what pages share | markdown.py tables of Markdown
"""
