"""A Hub on loopback, and this process's huggingface_hub and transformers pointed at it."""

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.dynamic_module_utils
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory
from loopback_hub import LoopbackHub


@pytest.fixture
def loopback_hub(monkeypatch, tmp_path_factory):
    """An empty Hub, with the token at hand and empty caches: one here, another for subprocesses."""
    hub = LoopbackHub(home=tmp_path_factory.mktemp("hf_home_of_subprocesses"))
    home = tmp_path_factory.mktemp("hf_home")
    elsewhere = "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH"
    for name in (*elsewhere, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**hub.environment, "HF_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)

    # What the libraries read from the environment at their import
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    for module in (transformers.utils.hub, transformers.dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    # What the libraries keep: the client of a test with its connections, and the code of repositories
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY", default_client_factory)
    huggingface_hub.close_session()
    _forget_remote_code()
    yield hub
    hub.close()
    huggingface_hub.close_session()
    _forget_remote_code()


@pytest.fixture
def naps(monkeypatch):
    """The seconds that the client would sleep between its attempts, which pass at once."""
    seconds = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def _forget_remote_code():
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
