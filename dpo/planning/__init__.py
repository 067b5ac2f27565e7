"""The work of the plan command: what a run will take, from its settings and the model's configs alone.

asked.py        what the command is asked beside the settings of a run
sketch.py       a model without its weights; configs/ holds those of published models
dry.py          the training step on tensors without content, every byte and FLOP counted
optimizers.py   the states of other libraries' optimizers
cuda.py         what CUDA does otherwise than the CPU, and the cards
work.py         a plan: memory, FLOPs, hours, disk
fitting.py      the largest micro-batch, the cheapest change that fits
recompute.py    which blocks a run computes again, where that is left open
full.py         what to say where a GPU's memory was full at the start
page.py         a plan in words
"""
