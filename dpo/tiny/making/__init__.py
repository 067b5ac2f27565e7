"""How the embedded world is made (by dpo/tiny/build.py). Nothing that a run uses imports this.

sprites.py   the drawings of the objects: fetched, or stand-ins
scenes.py    scenes drawn at random, their captions and pictures; which combinations are held out
loop.py      the training loop of every part
vae.py text.py pipeline.py   the pipeline's parts, and its training
judges.py    training the judges
pairs.py     preference pairs and prompt lists
detail.py    pairs of the second taste
unchanged.py what the unchanged model draws for the judged prompts
"""
