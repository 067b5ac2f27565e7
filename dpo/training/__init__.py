"""A run from settings to result.

build.py settings -> Run | run.py a run in progress; state.py its checkpoint; checkpoint.py checkpoints on disk
loop.py what surrounds the updates
optimizer.py the update | metrics.py what a step says of itself; trackers.py where figures go
validation.py held-out accuracy | flops.py counted work
folder.py the output folder | samples.py images; results.py weights; summary.py what the pages are made from
preparing.py the work of the prepare command; stored.py what a run takes from a store; embedded.py where nothing is named
"""
