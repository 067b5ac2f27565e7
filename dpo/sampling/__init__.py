"""The work of dpo.sample: from what a user names to a folder of images.

model.py      a pipeline folder, hub id, LoRA or training output as a diffusers pipeline
samplers.py   names of samplers
flags.py      flags of prompts, seeds and the protocol, for every command that draws
work.py       prompts, protocol and tasks; drawing, sheets and benchmark folders
"""
