"""dpo.models.text: a caption has the same tokens, and a weight is found, whatever the version of transformers."""

import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dpo.models.fingerprint import checksum, fingerprint
from dpo.models.load import load
from dpo.models.save import save_pipeline
from dpo.models.text import read_tokenizer, run_encoder, same_tokens, token_ids
from tests.help.ldm import write_single_file

KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]  # CLIP's vocabulary begins with the bytes in this order
BYTES = KEPT + [byte for byte in range(256) if byte not in KEPT]
START, END = 512, 513


def expected(caption: str) -> list[int]:
    """By CLIP's rules, for words of letters and a vocabulary without merges: a word is its bytes, the last one marked."""
    words = [[BYTES.index(byte) for byte in word.encode()] for word in caption.split()]
    return [START, *(id + 256 * (n == len(word) - 1) for word in words for n, id in enumerate(word)), END]


@pytest.fixture(params=["folder", "single file"])
def tokenizer(request, pipelines, tmp_path):
    if request.param == "folder":
        return load(str(pipelines["sd15"])).tokenizers[0]
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    return load(str(path), single_file_config=str(pipelines["sd15"])).tokenizers[0]


def test_words_of_every_script_are_words(tokenizer):
    for caption in ("a red fox", "日本語のキャプション", "한국어 狐 fox", "зимний лес"):
        assert tokenizer(caption).input_ids == expected(caption), caption
    assert tokenizer.model_max_length == 77


def test_tokenizer_json_alone_is_enough(pipelines, tmp_path):
    """As transformers 5 writes it."""
    own = load(str(pipelines["sd15"])).tokenizers[0]
    own.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert read_tokenizer(tmp_path)("狐 の fox").input_ids == own("狐 の fox").input_ids == expected("狐 の fox")


def test_what_a_pipeline_has_becomes_ours(pipelines):
    theirs = StableDiffusionPipeline.from_pretrained(pipelines["sd15"]).tokenizer
    ours = same_tokens(theirs)
    assert ours("日本語 の fox").input_ids == expected("日本語 の fox") and ours.pad_token == theirs.pad_token
    assert isinstance(theirs, CLIPTokenizer) and ours.model_max_length == theirs.model_max_length == 77
    assert same_tokens(ours) is ours


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_weights_are_found_and_identified_under_both_names(pipelines, tmp_path, kind):
    """With and without "text_model." in front, as files of transformers 4 and 5 have them."""
    found = []
    for prefix in ("text_model.", ""):
        folder = tmp_path / f"with {prefix}"
        shutil.copytree(pipelines[kind], folder)
        path = folder / "text_encoder" / "model.safetensors"
        named = {prefix + name.removeprefix("text_model."): value for name, value in load_file(path).items()}
        save_file(named, path, metadata={"format": "pt"})
        found.append(load(str(folder)).text_encoders)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for module in found[0]:
        wrapped = torch.nn.ModuleDict({"text_model": getattr(module, "text_model", module)})
        assert fingerprint(wrapped) == fingerprint(wrapped["text_model"])
        assert checksum(wrapped) == checksum(wrapped["text_model"])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_results_have_the_published_names(pipelines, tmp_path, kind):
    model = load(str(pipelines[kind]))
    save_pipeline(model, model.denoiser, tmp_path / "out")
    for (name, _), encoder in zip(model.family.text_encoders, model.text_encoders, strict=True):
        assert [path.name for path in (tmp_path / "out" / name).glob("*.safetensors")] == ["model.safetensors"]
        stored = load_file(tmp_path / "out" / name / "model.safetensors")
        projection = {"text_projection.weight"} & stored.keys()
        assert {key.split(".")[0] for key in stored.keys() - projection} == {"text_model"}
        own = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
        assert all(torch.equal(own[key.removeprefix("text_model.")], value) for key, value in stored.items())
        assert len(own) == len(stored)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_are_copied_to_a_gpu_without_waiting_for_it(device):
    """Only from page-locked memory does the host not wait."""
    ids, there = Mock(), torch.device(device)
    encoder = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=77), parameters=lambda: iter([SimpleNamespace(device=there)])
    )
    tokenizer = Mock(return_value=SimpleNamespace(input_ids=ids), model_max_length=77)
    found, locked = token_ids(tokenizer, encoder, ["a"]), ids.pin_memory.return_value
    if device == "cuda":
        assert found is locked.to.return_value and locked.to.call_args.kwargs == {"non_blocking": True}
    else:
        assert found is ids.to.return_value and not ids.pin_memory.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_an_encoder_makes_inside_is_as_wide_as_itself(world, dtype):
    """transformers 4 makes CLIP's mask in torch's default dtype, which afterwards is what it was."""
    model, seen = load(world("sd15")), []
    encoder = model.text_encoders[0].to(dtype)
    handle = encoder.register_forward_pre_hook(lambda *_: seen.append(torch.get_default_dtype()))
    assert run_encoder(model.tokenizers[0], encoder, ["a fox"])[0].dtype == dtype
    handle.remove()
    assert seen == [dtype] and torch.get_default_dtype() == torch.float32
