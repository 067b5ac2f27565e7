"""The network against torchvision's, the score against a loop, TensorFlow's differences one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import entropy
from torch.nn import functional as F

from dpo.common.errors import UserError
from dpo.scorers import inception
from dpo.scorers.inception import TF, TV, InceptionV3, from_published, inception_score, prepared
from tests.help.originals import original

OPENED = {TV: inception.torchvision, TF: inception.tensorflow}


def meta(kind):
    with torch.device("meta"):
        return InceptionV3(kind)


def random_state(kind, seed=0):
    """Random weights under our names, scaled so that no layer dies."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, value in meta(kind).state_dict().items():
        if value.dtype.is_floating_point:
            fan = value[0].numel() if value.ndim > 1 else 25
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
            if name.endswith(("running_var", "bn.weight")):
                state[name] = 1 + state[name].abs()
    return state


def published(state):
    return {name.removeprefix("stem."): value for name, value in state.items()}


def picture(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# --- the network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TV, TF], ids=lambda kind: kind.name)
def test_the_network_is_torchvisions(kind, monkeypatch):
    """TensorFlow's by torchvision's blocks with the pools that the published port changes: all nine averages."""
    theirs = original("torchvision.models.inception")
    calls = []

    def pool(x, kernel_size, stride, padding):
        calls.append(x.shape)
        if len(calls) == 9:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    if kind is TF:
        monkeypatch.setattr(theirs, "F", SimpleNamespace(**{**vars(F), "avg_pool2d": pool}))
    with torch.device("meta"):
        network = theirs.Inception3(num_classes=kind.classes, aux_logits=False, init_weights=False)
    state = random_state(kind)
    network.load_state_dict(published(state), assign=True)
    ours = meta(kind)
    ours.load_state_dict(from_published(published(state)), assign=True)
    x = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    with torch.inference_mode():
        expected = network.double().eval()(x)
        found = ours.double().eval()(x)
    if kind is TF:
        assert len(calls) == 9
        expected = expected - state["fc.bias"].double()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("kind, classes", [(TV, 1000), (TF, 1008)])
def test_the_network_has_the_published_sizes(kind, classes):
    """torchvision states 27,161,264 parameters with the auxiliary head, which has 3,326,696 of them."""
    network = meta(kind)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 27_161_264 - 3_326_696 + (classes - 1000) * 2049
    shapes = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    assert network(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, classes)
    assert shapes["stem"] == (192, 35, 35) and shapes["Mixed_5d"] == (288, 35, 35)
    assert shapes["Mixed_6e"] == (768, 17, 17) and shapes["Mixed_7c"] == (2048, 8, 8)


@pytest.mark.long
@pytest.mark.parametrize("kind", [TV, TF], ids=lambda kind: kind.name)
def test_features_are_read_from_converted_weights(kind, tmp_path):
    state = published(random_state(kind)) | {"AuxLogits.fc.bias": torch.zeros(3)}
    state["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(7)
    save_file(state, tmp_path / "w.safetensors")
    before = torch.get_rng_state()
    scorer = OPENED[kind](place=str(tmp_path), device="cpu", dtype=torch.float32, cache_dir=None)
    assert torch.equal(torch.get_rng_state(), before)
    images = [picture(320, 300), picture(64, 64, 1)]
    found = scorer.features(images=images)
    assert found.shape == (2, kind.classes) and found.dtype == torch.float32
    torch.testing.assert_close(found[1:], scorer.features(images=images[1:]), rtol=1e-4, atol=1e-4)
    network = meta(kind)
    network.load_state_dict(from_published(state), assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(found, network.eval()(prepared(kind, images)), rtol=1e-4, atol=1e-4)
    assert scorer.name == kind.name and scorer.fingerprint.startswith(kind.name)
    assert scorer.features(images=[]).shape == (0, kind.classes)
    state["fc.bias"] = state["fc.bias"] + 1
    save_file(state, tmp_path / "w.safetensors")
    again = OPENED[kind](place=str(tmp_path), device="cpu", dtype=torch.float32, cache_dir=None)
    assert again.fingerprint != scorer.fingerprint


def test_the_wrong_weights_are_one_line(tmp_path):
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds other weights than this scorer's"):
        inception.tensorflow(place=str(tmp_path), device="cpu", dtype=torch.float32, cache_dir=None)


# --- what the networks see ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 512), (640, 400), (100, 77)])
def test_torchvisions_network_sees_torchvisions_preprocessing(size):
    """Its weights come with ImageNet's mean and spread, and the network undoes them: what is left is 2 x - 1."""
    models = original("torchvision.models")
    with torch.device("meta"):
        undo = models.Inception3(transform_input=True, init_weights=False)._transform_input
    expected = undo(models.Inception_V3_Weights.IMAGENET1K_V1.transforms()(picture(*size))[None])
    torch.testing.assert_close(prepared(TV, [picture(*size)]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (640, 400), (100, 77)])
def test_tensorflows_network_sees_its_resizing(size):
    """Place i of the result lies at i * size / 299 of the image, between two pixels, the last repeated."""
    image = picture(*size)
    pixels = np.asarray(image, dtype=np.float64)

    def axis(values, count):
        at = np.arange(299) * (count / 299)
        return np.stack([np.interp(at, np.arange(count), column) for column in values])

    rows = axis(pixels.transpose(1, 2, 0).reshape(-1, size[1]), size[1]).reshape(size[0], 3, 299)
    both = axis(rows.transpose(1, 2, 0).reshape(-1, size[0]), size[0]).reshape(3, 299, 299)
    found = prepared(TF, [image])[0].double().numpy()
    np.testing.assert_allclose(found, (both - 128) / 128, atol=2e-4)


# --- the score ----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_over_ten_shuffled_splits():
    logits = torch.randn(237, 12, generator=torch.Generator().manual_seed(0)) * 3
    order = np.random.Generator(np.random.Philox(key=[0, 237])).permutation(237)
    shares = logits.double().softmax(-1).numpy()[order]
    scores = []
    for i in range(10):
        part = shares[i * 237 // 10 : (i + 1) * 237 // 10]
        scores.append(np.exp(np.mean([entropy(row, part.mean(0)) for row in part])))
    value, (low, high) = inception_score(logits)
    assert value == pytest.approx(np.mean(scores), rel=1e-9)
    assert (high - low) / 2 == pytest.approx(2.262157 * np.std(scores, ddof=1) / np.sqrt(10), rel=1e-6)
    assert (low + high) / 2 == pytest.approx(value, rel=1e-9)


def test_a_set_of_one_kind_scores_one_and_sure_classes_their_number():
    assert inception_score(torch.ones(100, 5))[0] == pytest.approx(1.0, abs=1e-12)
    sorted_by_class = torch.eye(4).repeat_interleave(1000, 0) * 100
    assert inception_score(sorted_by_class)[0] == pytest.approx(4.0, abs=0.02)


def test_too_few_images_are_one_line():
    with pytest.raises(UserError, match="^an Inception Score needs 20 images or more"):
        inception_score(torch.ones(19, 5))
