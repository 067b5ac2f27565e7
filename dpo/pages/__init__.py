"""What a person reads afterwards, made from a folder alone.

folder.py a run folder as data | verdict.py what it means, in words | charts.py, plots.py its charts | report.py report.html | card.py the model card
sweep.py the comparison of a sweep
"""
