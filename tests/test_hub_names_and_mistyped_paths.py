"""A hub that is out of reach costs one request and gets one message; a mistyped path never asks the hub."""

import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from huggingface_hub import constants

from hbt_fast.encoder import Encoder, EncoderError, hub
from hbt_fast.encoder.export import export
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.encoder.prompts import choose_prompts

TEXTS = ["en the red blue 7", "de which green"]
OWN = 1  # request that huggingface_hub may make in a process for its own header, before the first of all
READERS = {
    "encoder": Encoder.from_pretrained,
    "tokenizer": load_tokenizer,
    "prompts": lambda name: choose_prompts(name, {}),
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """No network: the hosts that are asked for, and an empty cache. A library that waits for the next try fails."""
    hosts = []

    def getaddrinfo(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def sleep(seconds):
        raise AssertionError(f"waits {seconds} s to ask again")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub._out_of_reach.cache_clear()
    yield hosts
    hub._out_of_reach.cache_clear()


def put_into_the_cache(folder, cache):
    commit = "0" * 40
    shutil.copytree(folder, cache / "models--someone--encoder" / "snapshots" / commit)
    (cache / "models--someone--encoder" / "refs").mkdir()
    (cache / "models--someone--encoder" / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_hub_out_of_reach_is_asked_once_and_said_in_one_message(asked, read):
    with pytest.raises(EncoderError) as caught:
        read("someone/encoder")
    assert 1 <= len(asked) <= OWN + 1
    said = str(caught.value)
    assert said.startswith("someone/encoder: no such folder, and as a hub name it is not in the cache (the hub is out")
    assert "Name or service not known); give a checkpoint folder, or run `hf download someone/encoder`" in said


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_where_offline_is_set_nothing_is_asked(asked, monkeypatch, read):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=r"it is not in the cache \(HF_HUB_OFFLINE is set\); give a checkpoint"):
        read("someone/encoder")
    assert asked == []


@pytest.mark.parametrize("offline", [True, False])
def test_a_name_in_the_cache_is_loaded_where_the_hub_is_out_of_reach(
    asked, make_encoder, tmp_path, monkeypatch, capsys, offline
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    folder = export(make_encoder(), tmp_path / "model")
    put_into_the_cache(folder, tmp_path / "cache")
    encoder = Encoder.from_pretrained("someone/encoder")
    np.testing.assert_array_equal(encoder.encode(TEXTS), Encoder.from_pretrained(folder).encode(TEXTS))
    assert len(asked) <= (0 if offline else OWN + 1)
    assert capsys.readouterr().err.count("taken from the cache; the hub is out of reach") == (not offline)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./runs/demo/modle", "did you mean runs/demo/model?"),
        ("../{here}/runs/dmeo/model", "did you mean ../{here}/runs/demo/model?"),
        ("{root}/runs/demo/modle", "did you mean {root}/runs/demo/model?"),
        ("{root}/runs/demo/x", "there is {root}/runs/demo, and nothing like x in it"),
        ("~/runs/demo/model", "did you mean {root}/runs/demo/model?"),  # a shell would have replaced it
        ("~/run/demo/model", "did you mean {root}/runs/demo/model?"),
        ("rnus/demo/model", "did you mean runs/demo/model?"),
        ("runs/deom", "did you mean runs/demo?"),
        ("runs/other", "there is runs, and nothing like other in it"),
        ("runs/demo/model/config.json", "is a file; give the folder that it is in: runs/demo/model"),
        ("notes", "notes is a file; give the folder that it is in: ."),
        ("rnus/", "did you mean runs?"),
        ("runs\\demo\\model", "no such folder"),
        ("my model", "did you mean my_model?"),
        ("", "no such folder; give a checkpoint folder or a hub name"),
        ("x" * 300, "no such folder"),
        ("a\0b", "no such folder"),
    ],
)
def test_a_mistyped_path_never_asks_the_hub_and_the_nearest_name_is_said(asked, tmp_path, monkeypatch, name, said):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("runs/demo/model", "my_model"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/demo/model/config.json", "notes"):
        (tmp_path / file).write_text("{}")
    places = {"here": tmp_path.name, "root": tmp_path}
    with pytest.raises(EncoderError) as caught:
        Encoder.from_pretrained(name.format(**places))
    assert said.format(**places) in str(caught.value)
    assert asked == []


def test_a_bare_name_may_be_the_hubs_and_the_nearest_folder_is_said_where_it_is_not(asked, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(EncoderError, match=r"as a hub name it is not in the cache .*; did you mean model\?"):
        Encoder.from_pretrained("modle")
    assert 1 <= len(asked) <= OWN + 1


def test_a_name_in_the_cache_may_begin_like_a_folder_that_is_there(asked, make_encoder, tmp_path):
    put_into_the_cache(export(make_encoder(), tmp_path / "model"), tmp_path / "cache")
    (tmp_path / "someone").mkdir()
    Encoder.from_pretrained("someone/encoder")
    with pytest.raises(EncoderError, match=r"someone/decoder: no such folder; give"):
        Encoder.from_pretrained("someone/decoder")


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (503, {}, r"the hub is out of reach: it answers with status 503\); give"),
        (200, {}, "the hub is out of reach: something else answers in its place"),
        (401, {"X-Error-Code": "RepoNotFound"}, "no such folder, and no such model on the hub .*; did you mean model?"),
    ],
)
def test_what_answers_in_place_of_the_hub_is_said(monkeypatch, tmp_path, status, headers, said):
    paths = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            paths.append(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        (tmp_path / "model").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "")
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + template)
        with pytest.raises(EncoderError, match=said):
            Encoder.from_pretrained("modell")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        hub._out_of_reach.cache_clear()
    assert paths == ["/modell/resolve/main/config.json"]
