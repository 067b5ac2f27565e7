"""dpo.models.outside: no key that transformers or diffusers would follow leads out of a model's own folder."""

import json
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import dynamic_module_utils, modeling_utils
from transformers.integrations import hub_kernels

from dpo.common.errors import UserError
from dpo.models.load import load
from dpo.models.outside import attention_of
from dpo.models.parts import component
from tests.help.ldm import write_single_file
from tests.help.loading import refused

ELSEWHERE = "org/repo"
HARMLESS = {  # the libraries keep them, or would follow what we set instead
    "attn_implementation": ELSEWHERE,
    "_attn_implementation": ELSEWHERE,
    "_attn_implementation_internal": ELSEWHERE,
    "auto_map": {"AutoModel": f"{ELSEWHERE}--code.Model"},
    "name_or_path": ELSEWHERE,
    "_name_or_path": ELSEWHERE,
    "custom_pipelines": {ELSEWHERE: {}},
}
REFUSED = {
    "transformers_weights": "../../elsewhere.safetensors",
    "configuration_files": ["config.9.9.9.json"],
    "experts_implementation": ELSEWHERE,
}
PARTS = ("text_encoder", "unet", "vae", "tokenizer")


@pytest.fixture(autouse=True)
def nothing_is_reached(monkeypatch):
    """Fails when a kernel, code of a repository or the network is asked for, though the loader may catch the error."""
    reached = []

    def way(name):
        def stop(*args, **kwargs):
            reached.append((name, args[:1]))
            raise RuntimeError(f"{name} was reached")

        return stop

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", way("a kernel"))
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", way("a kernel"), raising=False)
    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", way("code"))
    monkeypatch.setattr(socket, "getaddrinfo", way("the network"))
    yield
    assert reached == []


@pytest.fixture
def model(pipelines, tmp_path):
    shutil.copytree(pipelines["sd15"], tmp_path / "model")
    return tmp_path / "model"


def change(model, part, **keys):
    path = model / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_keys_that_are_not_followed_change_nothing(pipelines, model):
    for part in PARTS:
        change(model, part, **HARMLESS)
    ours, plain = load(str(model)), load(str(pipelines["sd15"]))
    assert ours.text_encoders[0].config._attn_implementation == "sdpa"
    assert plain.text_encoders[0].config._attn_implementation == "sdpa"  # what it was before anything was set
    for one, other in ((ours.text_encoders[0], plain.text_encoders[0]), (ours.denoiser, plain.denoiser)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert ours.tokenizers[0]("a red fox").input_ids == plain.tokenizers[0]("a red fox").input_ids


def test_nested_configs_name_no_attention_either(model):
    own = json.loads((model / "text_encoder" / "config.json").read_text())
    change(model, "text_encoder", model_type="clip", text_config=own | {"attn_implementation": ELSEWHERE})
    assert load(str(model)).text_encoders[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("part", PARTS[:3])
def test_keys_that_would_be_followed_are_refused(model, part):
    kept = (model / part / "config.json").read_text()
    for key, value in REFUSED.items():
        change(model, part, **{key: value})
        assert f"{part}/config.json has {key}" in refused(str(model))
        (model / part / "config.json").write_text(kept)


@pytest.mark.parametrize("part", PARTS[:3])
def test_an_adapter_beside_the_weights_names_no_base_model(model, part):
    (model / part / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": ELSEWHERE}))
    assert "merge the adapter" in refused(str(model))


def test_parts_that_are_named_on_their_own(model):
    change(model, "vae", transformers_weights=REFUSED["transformers_weights"])
    for name, folder in (("vae", model), (None, model / "vae")):
        with pytest.raises(UserError, match="transformers_weights"):
            component(AutoencoderKL, folder, name)


@pytest.mark.parametrize("where", ["top", "nested"])
def test_the_configs_of_a_single_file_name_no_attention(pipelines, model, tmp_path, where):
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    named = {"attn_implementation": ELSEWHERE}
    own = json.loads((model / "text_encoder" / "config.json").read_text())
    change(model, "text_encoder", **named if where == "top" else {"text_config": own | named})
    assert "no attention but its own" in refused(str(path), single_file_config=str(model))


@pytest.mark.parametrize("text", ["[]", "{", '{"a": ' * 100_000, "\ud800"])
def test_a_config_that_is_no_object_is_one_line(model, text):
    (model / "vae" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "vae/config.json cannot be read" in refused(str(model))


@pytest.mark.parametrize(("supported", "attention"), [(True, "sdpa"), (False, "eager")])
def test_an_encoder_has_the_attention_that_its_class_can_have(supported, attention):
    assert attention_of(type("Encoder", (), {"_supports_sdpa": supported})) == attention
