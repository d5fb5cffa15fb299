"""The cloud's metadata server is asked in its own way, and past proxies."""

import http.server
import threading

import pytest

from ddt_jax.io import metadata


def test_the_metadata_server_is_asked_as_it_wants_to_be(monkeypatch):
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            found = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found else 403)
            self.end_headers()
            self.wfile.write(b"TRUE\n")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("http_proxy", "http://localhost:9")  # which must not be asked
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(metadata, "SERVER", f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/instance/")
        assert metadata.fetch("preempted") == "TRUE"
        server.shutdown()
    assert asked == [("/computeMetadata/v1/instance/preempted", "Google")]
    with pytest.raises(OSError):
        metadata.fetch("preempted")
