"""Weights by name, from a stand-in for the Hugging Face Hub on this machine: no test needs the network."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import COMMIT, HubServer, serving
from small_models import filled

import top_jax
from top_jax.convert import hub, official_files, state_dict_of
from top_jax.convert.official_files import OFFICIAL_FILES, OfficialFile
from top_jax.errors import InputError, RunError
from top_jax.models import MODELS, VimConfig, abstract_model, abstract_segmenter, create_model

constants = pytest.importorskip("huggingface_hub.constants")

SHA = {name: found.sha256 for name, found in OFFICIAL_FILES.items()}
CONTENT = b"not really weights"
SMALL = VimConfig(embed_dim=16, depth=2, d_state=4, img_size=(32, 32))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A Hub with two repositories, an empty cache, and nothing resolved yet in this process."""
    files = {"a/b/c.pth": CONTENT, "a/b/sub/d.bin": b"d"}
    with serving(monkeypatch, tmp_path / "cache", files, gated=("g/g",)) as server:
        yield server


@pytest.fixture
def official(server, tmp_path, monkeypatch) -> dict[str, Any]:
    """The state_dict behind `vim_tiny`, a small model of that name; and its stride-8 variant."""
    monkeypatch.setitem(MODELS, "vim_tiny", SMALL)
    state_dicts = {}
    for name, sizes in (("vim_tiny", {}), ("vim_tiny.stride8", {"stride": 8})):
        model = filled(abstract_model("vim_tiny", **sizes), scale=0.3)
        top_jax.save_torch_checkpoint(model, tmp_path / f"{name}.safetensors")
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        file = f"{Path(OFFICIAL_FILES[name].file).stem}.safetensors"  # an official ViM is known by its file name
        server.files[f"o/r/{file}"] = content
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(OFFICIAL_FILES, name, OfficialFile("o/r", file, None, 0.0, digest, sizes))
        state_dicts[name] = state_dict_of(model)
    return state_dicts


def test_the_list_of_official_files(root):
    page = (root / "docs/guides/weights.md").read_text()
    for name, found in OFFICIAL_FILES.items():
        model = official_files.model_of(name)
        dataclasses.replace(MODELS[model], **found.sizes)  # raises for a size that the model lacks
        assert found.sha256 is None or len(bytes.fromhex(found.sha256)) == 32
        assert f"`{name}`" in page and f"`{found.file}`" in page and (found.authors_url or "") in page
        assert found.repository.count("/") == 1 and 70 < found.top1 < 85
    assert {official_files.model_of(name) for name in OFFICIAL_FILES} == MODELS.keys()
    assert SHA["vim_small"] == "aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3"


def test_a_file_is_downloaded_once(server, tmp_path):
    first = hub.local_file("hf://a/b/c.pth")
    assert first.read_bytes() == CONTENT and tmp_path in first.parents
    hub._download.cache_clear()  # as in another process
    assert hub.local_file("hf://a/b/c.pth") == first == hub.local_file(Path("hf://a/b/c.pth"))
    assert hub.local_file(f"hf://a/b@{COMMIT}/c.pth").read_bytes() == CONTENT
    assert hub.local_file("hf://a/b/sub/d.bin").read_bytes() == b"d"
    assert [path for method, path in server.requests if method == "GET"] == [
        "/a/b/resolve/main/c.pth",
        "/a/b/resolve/main/sub/d.bin",
    ]
    assert hub.local_file("runs/a") == Path("runs/a")


@pytest.mark.parametrize(
    "source, kind, offending",
    [
        ("hf://a/b/none.pth", InputError, "a/b has no such file"),
        ("hf://z/b/c.pth", InputError, "no public repository z/b"),
        ("hf://g/g/c.pth", InputError, "hf://g/g/c.pth is gated"),
        ("hf://a/b@dev/c.pth", InputError, "no such branch"),
        ("hf://a/b", InputError, "hf://OWNER/REPO/FILE"),
        ("hf://a--b/c..d/e", InputError, "hf://OWNER/REPO/FILE"),
        ("pretrained", InputError, "pretrained:NAME .*vim_small"),
        ("pretrained:vim_huge", InputError, "'vim_huge'.*vim_small"),
        ("pretrained:vim_small", InputError, "vim_s_midclstok_80p5acc.pth"),
    ],
)
def test_what_is_refused(server, source, kind, offending):
    with pytest.raises(kind, match=offending):
        hub.local_file(source)


def test_another_content_than_the_published_one(server, monkeypatch):
    known = OFFICIAL_FILES["vim_small"]
    server.files[f"{known.repository}/{known.file}"] = CONTENT
    with pytest.raises(InputError, match=f"{hashlib.sha256(CONTENT).hexdigest()} instead of {known.sha256}") as error:
        hub.local_file("pretrained:vim_small")
    damaged = Path(str(error.value).partition("Delete ")[2].partition(" and")[0])
    assert damaged.read_bytes() == CONTENT
    damaged.unlink()  # as the message says
    published = dataclasses.replace(known, sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(OFFICIAL_FILES, "vim_small", published)
    assert hub.local_file("pretrained:vim_small").read_bytes() == CONTENT


def test_an_interrupted_download_goes_on(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    server.breaks_after = 5
    assert hub.local_file("hf://a/b/c.pth").read_bytes() == CONTENT
    assert [method for method, _ in server.requests] == ["HEAD", "GET", "GET"]


def test_offline(server, monkeypatch):
    hub.local_file("hf://a/b/c.pth")
    hub._download.cache_clear()
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.local_file("hf://a/b/c.pth").read_bytes() == CONTENT
    with pytest.raises(RunError, match=r"hf://a/b/sub/d.bin is not in the cache, and HF_HUB_OFFLINE"):
        hub.local_file("hf://a/b/sub/d.bin")
    assert server.requests == []


def test_no_network(server, monkeypatch, caplog):
    hub.local_file("hf://a/b/c.pth")
    hub._download.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    assert hub.local_file("hf://a/b/c.pth").read_bytes() == CONTENT
    with pytest.raises(RunError, match="not in the cache, and the Hub cannot be reached"):
        hub.local_file("hf://a/b/sub/d.bin")
    assert not caplog.text  # huggingface_hub reports each of its tries


def test_without_the_package(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"huggingface_hub: pip install 'top-jax\[hub\]'"):
        hub.local_file("hf://a/b/c.pth")


def body(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state_dict.items() if not name.startswith("head.")}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_models_with_official_weights(official):
    create: Callable[..., Any] = top_jax.create_model
    assert_same(state_dict_of(create("vim_tiny", pretrained=True)), official["vim_tiny"])
    pruning = top_jax.Pruning(after_blocks=(1,), keep_ratio=0.5)
    pruned = create("vim_tiny", pretrained=True, pruning=pruning, num_classes=3)
    assert_same(body(state_dict_of(pruned)), body(official["vim_tiny"]))
    assert pruned.reduction is pruning and pruned.head.kernel.shape == (16, 3)
    headless = create("vim_tiny", pretrained=True, num_classes=0)
    assert jax.eval_shape(headless, jnp.zeros((1, 32, 32, 3))).shape == (1, 16)
    larger = create("vim_tiny", pretrained=True, img_size=64)
    assert larger.pos_embed.shape == (1, 17, 16)
    variant = create("vim_tiny.stride8", pretrained=True)
    assert variant.config.stride == 8
    assert_same(state_dict_of(variant), official["vim_tiny.stride8"])
    assert_same(state_dict_of(top_jax.load_torch_checkpoint("pretrained:vim_tiny.stride8")), state_dict_of(variant))


@pytest.mark.parametrize(
    "name, settings, offending",
    [
        ("vim_huge", {"pretrained": True}, "'vim_huge'"),
        ("vim_tiny", {"pretrained": True, "embed_dim": 32}, "embed_dim=16, but the model has embed_dim=32"),
        ("vim_tiny", {"pretrained": True, "stride": 8}, "stride 16"),
        ("vim_tiny", {"pretrained": 1}, "pretrained=1"),
        ("vim_tiny.stride8", {}, r"pretrained=True.*stride=8"),
        ("vim_tiny", {"pretrained": True, "wide": 1}, "'wide'"),
    ],
)
def test_wrong_calls_of_create_model(official, without_type_checks, name, settings, offending):
    with pytest.raises(InputError, match=offending):
        top_jax.create_model(name, **settings)


def test_pretrained_is_not_for_random_models():
    with pytest.raises(InputError, match="top_jax.create_model"):
        create_model("vim_tiny", pretrained=True)


def test_runs_and_commands_take_names(official, tmp_path):
    from top_jax.config import RunConfig
    from top_jax.models.weights import weights_of
    from top_jax.training.class_names import imagenet_synsets
    from top_jax.training.saved_weights import find_weights, initial_weights

    want = weights_of(top_jax.create_model("vim_tiny", pretrained=True))
    for name in ("pretrained", "pretrained:vim_tiny", f"hf://o/r/{OFFICIAL_FILES['vim_tiny'].file}"):
        config = RunConfig.from_config_dict({"init_from": name, "model": {"name": "vim_tiny", "num_classes": 1000}})
        found = initial_weights(config)
        np.testing.assert_array_equal(found["pos_embed"], want["pos_embed"])
        np.testing.assert_array_equal(found["head"]["kernel"], want["head"]["kernel"])
        assert find_weights(name, "vim_tiny").about("best", None) == {"ema": False}
        assert hub.is_name(name) and not Path(hub.label_of(name)).parent.name
    three = RunConfig.from_config_dict({"init_from": "pretrained", "model": {"name": "vim_tiny", "num_classes": 3}})
    with pytest.raises(InputError, match="init_head=new"):
        initial_weights(three)
    assert initial_weights(dataclasses.replace(three, init_head="new"))["head"]["kernel"].shape == (16, 3)
    other = RunConfig.from_config_dict({"init_from": "pretrained:vim_tiny", "model": {"name": "vim_small"}})
    with pytest.raises(InputError, match="vim_tiny, but vim_small"):
        initial_weights(other)
    assert find_weights("pretrained", "vim_tiny").class_names(1000) == imagenet_synsets()


def test_list_models():
    assert top_jax.list_models() == list(MODELS) and top_jax.list_models("deit_*") == [
        "deit_tiny",
        "deit_small",
        "deit_base",
    ]
    assert top_jax.list_models(("vim_t*", "plain_mamba_l1"), pretrained=True) == [
        "vim_tiny",
        "vim_tiny.stride8",
        "plain_mamba_l1",
    ]
    assert top_jax.list_models("resnet*") == []


def test_data_config_is_what_preprocess_takes(tiny_config, tmp_path, without_type_checks):
    from top_jax.training.run_directory import RunDirectory

    run = RunDirectory(tmp_path / "run")
    with run.lock():
        run.claim(tiny_config)
    defaults = top_jax.data_config("vim_small")
    pixels = np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8)
    np.testing.assert_array_equal(top_jax.preprocess(pixels, **defaults), top_jax.preprocess(pixels))
    assert defaults == top_jax.data_config("vim_small.stride8")
    model = filled(abstract_model("vim_tiny", img_size=32, depth=1), scale=0.3)
    assert top_jax.data_config(model)["img_size"] == (32, 32)
    own = top_jax.data_config(run.path)
    assert (own["mean"], own["eval_crop"]) == (tiny_config.data.mean, tiny_config.data.eval_crop)
    for wrong in ("vim_huge", 3, None):
        with pytest.raises(InputError, match="model"):
            top_jax.data_config(wrong)
    segmenter = abstract_segmenter("vim_tiny", depth=4, img_size=32)
    with pytest.raises(InputError, match="is a segmenter; top_jax.segment"):
        top_jax.data_config(segmenter)
