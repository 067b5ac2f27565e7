"""The work of dpo.export and dpo.extract: a result handed on to other programs.

asked.py what an export is asked for | pieces.py tensors that are read when they are asked for, and written one by one
spec.py what a file says of itself | whole.py a model in the original layout, or in fp16
adapters.py a LoRA under other programs' names | work.py an export, from what is asked to a file
sources.py the two models of an extraction, read layer by layer | difference.py one layer's change, decomposed
extracting.py a LoRA from two models | table.py what it holds and what not, in words
"""
