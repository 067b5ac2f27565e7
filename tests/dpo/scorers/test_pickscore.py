from __future__ import annotations

import torch

from dpo.scorers.pickscore import pickscore
from tests.dpo.scorers.test_towers import CAPTIONS, pictures
from tests.help.towers import save_tiny_clip


def test_the_scale_is_the_logit_scale_of_the_weights(tmp_path):
    model = save_tiny_clip(tmp_path)
    scorer = pickscore(place=str(tmp_path), device="cpu")
    cosine = (scorer.towers.images(pictures()) * scorer.towers.texts(CAPTIONS)).sum(-1)
    got = scorer.score(images=pictures(), captions=CAPTIONS)
    torch.testing.assert_close(got, model.logit_scale.exp().detach() * cosine)
    assert scorer.temperature == 1.0, "its scores are the logits that it was trained as"
    assert scorer.name == "pickscore" and scorer.fingerprint.startswith("pickscore ")
