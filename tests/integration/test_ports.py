"""Open ports: none is reachable from another machine, and Ray requires its token."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

_VLLM = """
import os, socket, sys, tempfile
from pathlib import Path
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings, RolloutSettings
from gft_lite.rollout.registry import start_engine

def listening():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    own = {os.readlink(link)[8:-1] for link in links if os.path.lexists(link)}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A" and rest[5] in own:
                yield address.split(":")[0]

policy = load_policy(PolicySettings(gradient_checkpointing=False))
settings = RolloutSettings(engine="vllm", kv_cache_mib=64, batch_size=4)
with tempfile.TemporaryDirectory() as scratch:
    engine = start_engine(settings, policy, Path(scratch))
    print(socket.gethostname(), *sorted(set(listening())))
    engine.close()
    print("after", *listening())
"""

_HOST = """
import os, subprocess, sys
from gft_lite.experiments.launchers import RayLauncher

launcher = RayLauncher(1)
import ray

address = ray.get_runtime_context().gcs_address
stranger = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
for who in (os.environ, stranger):
    guest = [sys.executable, "-c", sys.argv[1], address]
    done = subprocess.run(guest, env=who, capture_output=True, text=True)
    print(done.returncode, done.stdout.strip())
launcher.close()
"""

_GUEST = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 42).remote()))
"""


def run(code: str, *arguments: str, before: tuple[str, ...] = (), **environment: str):
    command = [*before, sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, **environment}
    )


def _outside() -> str | None:
    """An address of this machine that others could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Sends nothing.
        except OSError:
            return None
        return probe.getsockname()[0]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_vllm_listens_on_the_loopback_address_only():
    """Under a host name that is an address of the network, which it would listen on by default."""
    address = _outside()
    rename: tuple[str, ...] = ()
    unshare = ["unshare", "--user", "--map-root-user", "--uts"]
    if address and shutil.which("unshare") and not subprocess.run([*unshare, "true"]).returncode:
        rename = (*unshare, "sh", "-c", f'hostname {address}; exec "$@"', "sh")
    done = run(_VLLM, before=rename)
    assert done.returncode == 0, done.stderr[-2000:]
    during, after = done.stdout.splitlines()[-2:]
    host, *addresses = during.split()
    assert not rename or host == address
    assert addresses and set(addresses) <= {"0100007F", "00000000000000000000000001000000"}
    assert after == "after"


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_stranger_cannot_use_our_ray():
    done = run(_HOST, _GUEST)
    assert done.stdout.splitlines() == ["0 ran 42", "1 "], done.stderr[-2000:]
