"""`push_to_hub` uploads what a run exported, tried against a stand-in of the hub's API on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from test_adapters import one_device, trained, with_lora

pytestmark = pytest.mark.slow


class Hub(BaseHTTPRequestHandler):
    """Creates repositories and takes commits; keeps both in the server. Refuses the owner `nobody`."""

    server: "Server"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_token" or "nobody" in self.path or b"nobody" in body:
            self.answer(403, {"error": "not allowed to write"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": f"{constants.ENDPOINT}/owner/name"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{constants.ENDPOINT}/owner/name/commit/0"}
            )
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): ...


class Server(ThreadingHTTPServer):
    created: list[dict]
    files: dict[str, bytes]


@pytest.fixture
def hub(monkeypatch):
    with Server(("127.0.0.1", 0), Hub) as server:
        server.created, server.files = [], {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield server
        server.shutdown()


def test_a_run_uploads_its_last_weights_with_their_card(hub, trajectory, caplog):
    run = trajectory("dpo_8_k4")
    assert run.train("push_to_hub=owner/name") is None
    (created,) = hub.created
    assert created["name"] == "name" and created["organization"] == "owner"
    assert created.get("visibility") == "private" or created["private"]  # by the version of huggingface_hub
    folder = run.folder / "out" / "epoch_0"
    assert hub.files == {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    assert hub.files["README.md"].startswith(b"---\nbase_model:")
    assert f"uploaded: {constants.ENDPOINT}/owner/name/commit/0" in caplog.text


@pytest.mark.parametrize("is_there", [True, False], ids=["refuses", "is away"])
def test_a_failed_upload_leaves_the_weights_and_says_how_to_send_them(is_there, hub, trajectory, monkeypatch, caplog):
    if not is_there:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    run = trajectory("dpo_8_k4")
    assert run.train("push_to_hub=nobody/name", "max_steps_per_epoch=1") is None
    folder = run.folder / "out" / "epoch_0"
    (said,) = (record.message for record in caplog.records if record.message.startswith("push_to_hub: "))
    assert said.endswith(f"upload it later: hf upload nobody/name {folder}")
    assert (folder / "README.md").is_file() and not hub.files


@pytest.mark.parametrize("repo_id", [None, "owner/base"])
def test_of_an_adapter_alone_its_folder_is_uploaded(repo_id, hub, trajectory, caplog):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    if repo_id:  # as tune download leaves it
        (run.folder / "model" / "original_repo_id.json").write_text(json.dumps({"repo_id": repo_id}))
    trained(run, "max_steps_per_epoch=1", "save_adapter_weights_only=True", "push_to_hub=owner/name")
    assert "adapter_model.safetensors" in hub.files and b'library_name: "peft"' in hub.files["README.md"]
    base = json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"]
    assert base == (repo_id or str(run.folder / "model"))
    assert (f"names this machine's folder {base} as the base model" in caplog.text) == (repo_id is None)


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("name", "push_to_hub: expected owner/name, got 'name'"),
        (
            "owner/name",
            "push_to_hub: there is no token of the Hugging Face hub; run hf auth login",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_run(repo, message, trajectory, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    run = trajectory("dpo_8_k4")
    assert message in run.train(f"push_to_hub={repo}")
    assert not (run.folder / "out" / "epoch_0").exists()
