"""What Google's cloud knows about the machine that asks: https://cloud.google.com/compute/docs/metadata/."""

SERVER = "http://metadata.google.internal/computeMetadata/v1/instance/"
TIMEOUT = 3.0  # seconds for an answer


def fetch(name: str) -> str:
    """A value that the metadata server keeps about this machine. Raises OSError or HTTPException."""
    import urllib.request  # slow, and few who import this module ask

    request = urllib.request.Request(SERVER + name, headers={"Metadata-Flavor": "Google"})
    # No proxy stands between a machine and its own metadata, whatever the environment says.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT) as answer:
        return answer.read(1 << 20).decode("utf-8", "replace").strip()
