"""A real web server over a folder: ranges, a slow connection, random refusals, no ranges at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.servers.loopback import ADDRESS, free_port, program, running, wait_for_port

# one process on purpose: no worker can survive a killed master
CONFIGURATION = """
daemon off;
master_process off;
pid {state}/pid;
error_log {state}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {state}/access.log;
  default_type application/octet-stream;
  client_body_temp_path {state}/body;
  proxy_temp_path {state}/proxy;
  fastcgi_temp_path {state}/fastcgi;
  uwsgi_temp_path {state}/uwsgi;
  scgi_temp_path {state}/scgi;
  split_clients "$request_id" $flaky {{ {flaky}% 1; * 0; }}
  server {{
    listen {address}:{port};
    root {folder};
    location /slow/ {{ alias {folder}/; limit_rate {slow}; }}
    location /flaky/ {{ if ($flaky) {{ return 503; }} alias {folder}/; }}
    location /norange/ {{ alias {folder}/; max_ranges 0; }}
    location /gzip/ {{ alias {folder}/; gzip on; gzip_types *; }}
  }}
}}
"""


@contextlib.contextmanager
def web_server(folder: Path, state: Path, *, slow: int = 2**20, flaky: int = 20) -> Iterator[str]:
    """Serve `folder` at the yielded URL; `state` is an empty folder for nginx's own files.

    Below the URL, `/slow/` sends `slow` bytes a second, `/flaky/` answers `flaky` percent of the
    requests with 503, `/norange/` always sends the whole file.
    """
    nginx, port = program("nginx", "nginx-light"), free_port()
    configuration, log = state / "nginx.conf", state / "output.log"
    configuration.write_text(
        CONFIGURATION.format(
            state=state, folder=folder, address=ADDRESS, port=port, slow=slow, flaky=flaky
        )
    )
    command = [nginx, "-c", str(configuration), "-e", str(state / "error.log")]
    with running(command, log) as process:
        wait_for_port(port, process, log)
        yield f"http://{ADDRESS}:{port}"
