"""Images from a pipeline: sample images of a run, and whole sets by a stated protocol.

draw.py       sample images for fixed prompts and seeds     grid.py      the PNG grid that shows them
memory.py     what drawing takes of a GPU's memory          protocol.py  everything that decides the pixels of a set
prompts.py    prompts from text, files and public sets      render.py    one group of images by a diffusers pipeline
images.py     a set in a folder: drawn, resumed, read       sheet.py     its contact sheets
layouts.py    the folders that public benchmarks read     contact.py  the sheet of a set of pairs
"""
