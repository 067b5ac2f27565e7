"""A model as modules: found, loaded, changed, saved.

family.py what the trainer must know of an architecture; sd.py, sdxl.py one each | hub.py a name -> a place on disk
load.py a diffusers folder; single_file.py one checkpoint; parts.py one module | ready.py loaded, settings decided, cast, placed
denoiser.py choices made on a denoiser; kernels.py the fused kernels in it | lora.py adapters
pipeline.py a diffusers pipeline, for sampling and saving | save.py the result
fingerprint.py identities | text.py captions to tokens

To add a family: write a file beside sd.py that makes a `Family`, and name it in family.py.
"""
