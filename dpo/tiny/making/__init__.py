"""How the embedded world is made: loop.py the training loop of its parts, vae.py, text.py, judges.py, pipeline.py, pairs.py."""
