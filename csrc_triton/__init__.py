"""Custom operations for preference training: Triton kernels on GPUs, plain torch everywhere else. Knows tensors only.

Import each op from its module; a module shares its name with its op, so that nothing is re-exported here.

    op               Op, op                                                an operation that torch knows, and the short way to it
    philox           random_bits, uniform, normal, integers; Stream        keyed random numbers
    timesteps        draw_timesteps                                        the timestep of each pair
    noising          noise_pairs, sample_posterior                         noisy latents of pairs, VAE posterior
    pair_errors      pair_errors                                           errors, difference and logit of pairs, sums by timestep
    geglu            geglu
    group_norm_silu  group_norm_silu
    layer_norm       layer_norm, add_layer_norm
    adamw8bit        AdamW8bit
    parts            Part                                                  a shard of a parameter, as AdamW8bit counts it

Every `<op>` has a plain-torch `<op>_reference` beside it, which is also its CPU implementation. The longer kernels lie
in a file of their own, `<module>_kernels.py`. language.py stands in for triton where there is
none; specimen.py lists what is launched, to be compiled without a GPU. What the kernels compute, move and cost:
docs/kernels.md.
"""
