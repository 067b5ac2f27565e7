"""A training loop resumes exactly, and lends its module the averaged weights."""

import pytest
import torch

from dpo.tiny import judge
from dpo.tiny.making import judges, loop, sprites
from dpo.tiny.making.scenes import Renderer, world


class Killed(Exception):
    pass


def test_training_resumes_exactly(tmp_path):
    small = world(3)
    render = Renderer(sprites.stand_ins(list(small.objects)))
    plan = loop.Plan(steps=4, batch=4, lr=1e-3, ema=0.9, warmup=2, save_every=2)

    def run(folder, on_save=None):
        torch.manual_seed(0)
        network = judge.ARCHITECTURES["b"](3)

        def loss_of(draw, batch):
            scenes = small.sample(draw.numpy, batch)
            return judges.loss_of(network, judges.blur(judge.pixels(render(scenes)), draw), scenes)

        loop.train(network, loss_of, plan, folder, on_save=on_save)
        return network.state_dict()

    def kill():
        raise Killed

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "halves", kill)
    halves = run(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_averaged_weights_are_lent_and_given_back():
    module = torch.nn.Linear(2, 2)
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    average = {name: torch.zeros_like(p) for name, p in own.items()}
    with pytest.raises(Killed), loop.averaged(module, average):
        assert not any(p.any() for p in module.parameters())
        raise Killed
    assert all(torch.equal(p, own[name]) for name, p in module.named_parameters())
