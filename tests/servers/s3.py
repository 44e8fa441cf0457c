"""A real S3 server (Ceph's object gateway, everything in memory) and its users' environment."""

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.servers.loopback import ADDRESS, free_port, program, running, wait_for_port
from benchmarks.waiting import SECONDS, until

KEY, SECRET = "testkey", "testsecret12"
# program -> Debian package
PROGRAMS = {
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "monmaptool": "ceph-common",
}
# permissions inside the cluster
USERS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
}

# Keys stay on: without cephx the gateway hangs while it connects. The short intervals only speed up
# the monitor's election, which is most of the start.
CONFIGURATION = """
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = [v2:{address}:{mon_v2}/0,v1:{address}:{mon_v1}/0]
public_addr = {address}
cluster_addr = {address}
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data = {folder}/mon
mon_data_avail_crit = 1
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_tick_interval = 1
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 1073741824
osd_memory_target = 1073741824
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint={address}:{port}
rgw_dynamic_resharding = false
"""


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server on loopback."""

    port: int

    def environment(self, port: int | None = None, secret: str = SECRET) -> dict[str, str]:
        """Return the environment variables of a user, through a different port if one is given."""
        return {
            "AWS_ENDPOINT_URL": f"http://{ADDRESS}:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            # ignore the user's own profile, region and instance role
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def use_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set the variables for this process; clients with earlier ones are dropped."""
    import s3fs

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Run an S3 server (monitor, storage daemon and gateway) in the empty folder `folder`."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install '.[s3]')")
    paths = {name: program(name, package) for name, package in PROGRAMS.items()}
    mon_v2, mon_v1, port = free_port(), free_port(), free_port()
    fsid, log = str(uuid.uuid4()), folder / "output.log"
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    configuration, keyring, monmap = folder / "ceph.conf", folder / "keyring", folder / "monmap"
    configuration.write_text(
        CONFIGURATION.format(
            fsid=fsid, address=ADDRESS, mon_v2=mon_v2, mon_v1=mon_v1, folder=folder, port=port
        )
    )

    def call(name: str, *arguments: str | Path) -> str:
        command = [paths[name], *map(str, arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def daemon(name: str, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
        return running([paths[name], "-c", str(configuration), "-f", *arguments], log)

    for entity, capabilities in USERS.items():
        caps = [word for item in capabilities.items() for word in ("--cap", *item)]
        create = [] if keyring.exists() else ["--create-keyring"]
        call("ceph-authtool", keyring, "--gen-key", *create, "-n", entity, *caps)
    addresses = f"[v2:{ADDRESS}:{mon_v2},v1:{ADDRESS}:{mon_v1}]"
    call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap)
    use = ("-c", configuration)
    call("ceph-mon", *use, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(daemon("ceph-mon", "-i", "a"))
        osd_uuid = str(uuid.uuid4())
        call("ceph", *use, "osd", "create", osd_uuid)
        call("ceph-osd", *use, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        daemons.enter_context(daemon("ceph-osd", "-i", "0"))
        until(lambda: "1 up" in call("ceph", *use, "osd", "stat"), f"the storage daemon: see {log}")
        user = ("--uid=tests", "--display-name=tests")
        keys = (f"--access-key={KEY}", f"--secret-key={SECRET}")
        call("radosgw-admin", *use, "user", "create", *user, *keys)
        gateway = daemons.enter_context(daemon("radosgw", "--name", "client.rgw.a"))
        wait_for_port(port, gateway, log)
        yield ObjectStore(port)
