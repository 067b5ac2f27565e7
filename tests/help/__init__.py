"""What tests share.

worlds.py tiny pipelines and preference sets on disk | pipelines.py how a tiny pipeline is made
flow.py tiny pipelines of flow-matching families
ldm.py a tiny pipeline as a single file | running.py runs in the test's own process
reading.py batches as a run reads them | loading.py models that cannot be loaded
commands.py the command itself, what it wrote and left | children.py forked children, and kills
shapes.py pairs whose images are not square
stores.py small stores without a model | fake_run.py run folders that look like real ones
elsewhere.py a machine without triton and without what only POSIX has | allocations.py tensors made inside a block
imports.py the imports of a source tree | oracle.py the pairwise loss from predictions, in plain torch
originals.py torchvision and open_clip, where they are installed to compare with | towers.py tiny CLIP models
pages.py pages as a parser and a browser see them | judges.py scorers of one's own
evaluations.py content of an evaluation.json, made up
drawing.py dpo.sample in the test's own process | labelling.py dpo.label likewise | pairing.py dpo.pairs likewise
browser.py a real browser, driven by its DevTools | votes.py studies of small images, and what serves them | handed.py LoRA runs to hand on
simulated.py studies voted on by raters with known preferences | processes.py several processes of one run
trackers.py a stand-in for the package of W&B | operations.py operations, counted
"""
