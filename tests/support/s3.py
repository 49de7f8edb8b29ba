"""moto's S3 server in a process of its own, with a bucket."""

import subprocess
import sys
import threading
import urllib.request

from tests.support.teams import free_port

KEY, SECRET = "AKIAOFTHETEST", "wJalrSecretOfTheTest"
TIMEOUT = 60.0


def environment(url: str) -> dict[str, str]:
    """What a client of the store at an address needs."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


class Server:
    """A server that has started. `environment` is what a client needs."""

    bucket = "bucket"

    def __init__(self) -> None:
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Running on" in line:
                break
        else:
            raise AssertionError("moto's server did not start")
        # Its log is read on, so that it never waits for a reader.
        self._drain = threading.Thread(target=self._process.stderr.read)
        self._drain.start()
        self.environment = environment(f"http://127.0.0.1:{port}")
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{self.bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=TIMEOUT).close()

    def stop(self) -> None:
        """Kill it; once more does nothing."""
        self._process.kill()
        self._process.wait(TIMEOUT)
        self._drain.join(TIMEOUT)
        if self._process.stderr:
            self._process.stderr.close()
