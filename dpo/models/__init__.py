"""A model as modules: found, loaded, changed, saved.

family.py what the trainer must know of an architecture; sd.py, sdxl.py, sd3.py, flux.py, flux2.py, qwen.py a family each
hub.py a name -> a place on disk
load.py a diffusers folder; single_file.py a single checkpoint file; parts.py one module
checks.py what a model must be, asked of its configs and file headers
outside.py what its configs may not name: code, other files, other models
weights.py the weights of one network in a file of any layout | original.py what weights are called in the original one
ready.py a model loaded, its settings decided, cast and placed | denoiser.py choices made on a denoiser
buffers.py what a cast to another dtype leaves alone
offload.py activations that wait in host memory | compiled.py repeated blocks, compiled
apart.py the samples of a batch on a core each
attention.py one operation for policy and reference | kernels.py the fused kernels in a UNet
pipeline.py a diffusers pipeline, for sampling and saving
lora.py adapters in a denoiser; adapter.py the tensors of one; lora_files.py those of other tools, read; dropout.py
dropout inside them
save.py the result | fingerprint.py identities | text.py captions to tokens

To add a family: write a file beside sd.py that makes a `Family`, and name it in family.py.
"""
