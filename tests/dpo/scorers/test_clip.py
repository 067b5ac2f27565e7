from __future__ import annotations

import torch

from dpo.scorers.clip import clip_h14, clip_h14_pad, clip_l14
from tests.dpo.scorers.test_towers import CAPTIONS, pictures
from tests.help.towers import save_tiny_clip


def test_the_names_differ_in_fingerprint_and_padding_in_score(tmp_path):
    save_tiny_clip(tmp_path)
    scorers = [make(place=str(tmp_path), device="cpu") for make in (clip_l14, clip_h14, clip_h14_pad)]
    assert [scorer.name for scorer in scorers] == ["clip-l14", "clip-h14", "clip-h14-pad"]
    assert len({scorer.fingerprint for scorer in scorers}) == 3
    l14, h14, padded = (scorer.score(images=pictures(), captions=CAPTIONS) for scorer in scorers)
    assert torch.equal(l14, h14) and l14.abs().max() <= 1
    assert (h14 - padded)[1:3].abs().max() > 1e-3  # pictures that are no squares
