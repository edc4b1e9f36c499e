"""Ranks of the embedded engine: equal at any number, on any host, and none outlives another, however it dies.

Several hosts are this machine under two names: mpirun reaches the second through a script that takes the
place of ssh and starts a clean environment. That tests placement, TCP between ranks, exports and endings,
not a network.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import fused

from builder import trtllm
from builder.errors import UserError
from engines import mpi
from engines.embedded import ranks
from engines.embedded.compilation import build
from engines.embedded.session import EngineError, Request, Session

ROOT = Path(__file__).resolve().parent.parent
PROMPT = tuple(range(5, 75))
HERE = socket.gethostname()
HOSTS = (f"{HERE}:1", "elsewhere:1")
LONG = Request(input_ids=(1, 2), max_tokens=158)

SUMS_SCRIPT = """
import sys
import torch
from engines.embedded.collectives import MPIRanks
ranks = MPIRanks()
world = ranks._world
torch.manual_seed(ranks.rank)
for dtype in (torch.float32, torch.bfloat16):
    own = (torch.randn(32, 4096) * 10).to(dtype)
    batch = torch.ops.ffn_fusion.all_reduce(own)
    rows = torch.cat([torch.ops.ffn_fusion.all_reduce(own[i : i + 1]) for i in range(32)])
    few = torch.ops.ffn_fusion.all_reduce(own[:, :7])  # not contiguous
    assert batch.dtype == dtype
    assert torch.equal(rows, batch) and torch.equal(few, batch[:, :7])
    bits = world.allgather(batch.view(torch.uint8).numpy().tobytes())
    assert len(bits) == int(sys.argv[1]) and len(set(bits)) == 1
    parts = torch.stack(world.allgather(own))
    exact = parts.double().sum(0)
    assert float(exact.abs().max()) > 10
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-22
    assert bool(((batch.double() - exact).abs() <= rounding * exact.abs() + 1e-4).all())
    p = parts.float()
    sums = {
        2: lambda: p[0] + p[1],
        3: lambda: (p[0] + p[1]) + p[2],
        4: lambda: (p[0] + p[1]) + (p[2] + p[3]),
    }
    assert torch.equal(batch, sums[len(p)]().to(dtype))
print("same", flush=True)
"""

SESSION_SCRIPT = """
import sys
from pathlib import Path
from engines.embedded.session import Request, Session
session = Session(Path(sys.argv[1]), hosts=tuple(sys.argv[2:]))
print(*session.pids, flush=True)
while True:
    list(session.generate(Request(input_ids=(1, 2), max_tokens=150)))
"""


@pytest.fixture(scope="module")
def tiny_engine_tp4(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded engine, TP 4: its two KV heads are each on two ranks."""
    directory = tmp_path_factory.mktemp("tp4")
    trtllm.convert(fused(tiny_hf), directory / "checkpoint", tp_size=4)
    build(directory / "checkpoint", directory / "engine", max_batch_size=4, max_input_len=96, max_seq_len=160)
    return directory / "engine"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files and shared memory go; nothing may be left there, nor a process that knows it."""
    directory = tmp_path / "files"
    directory.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_test_ranks")
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv(mpi.SHARED_MEMORY, str(directory))
    yield directory
    within(5, lambda: not [*processes(directory), *directory.iterdir()])
    assert processes(directory) == []
    assert list(directory.iterdir()) == []


@pytest.fixture
def second_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun reaches any host by running the command here, with no more than ssh would leave it."""
    agent = tmp_path / "agent"
    agent.write_text(
        '#!/bin/bash\nexec env -i HOME="$HOME" PATH=/usr/bin:/bin TMPDIR="$TMPDIR" '
        'TORCHINDUCTOR_CACHE_DIR="$TORCHINDUCTOR_CACHE_DIR" bash -c "${*:2}"\n'
    )
    agent.chmod(0o755)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(agent))
    address = next((a for a in addresses() if not a.startswith("127.")), None)
    if address is None:  # Open MPI leaves the loopback out unless it is asked for
        monkeypatch.setenv("OMPI_MCA_btl_tcp_if_include", "127.0.0.0/8")


def addresses() -> list[str]:
    """This host's IPv4 addresses."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    return [a for a in said.split() if "." in a]


def generate(session: Session, request: Request) -> list[int]:
    return [token for output in session.generate(request) for token in output.token_ids]


def processes(directory: Path) -> list[int]:
    """Those alive whose command line or environment has `directory`, but not this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(directory) in words:
                found.append(int(entry.name))
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def within(seconds: float, condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_rank(pid: int, rank: int | None = None) -> bool:
    """Whether a process is a rank, or that rank."""
    if "engines.embedded.worker" not in command(pid) or "prterun" in command(pid):
        return False
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return rank is None or b"OMPI_COMM_WORLD_RANK=%d" % rank in environment


def segments(directory: Path) -> list[Path]:
    """Open MPI's shared memory."""
    return list(directory.rglob("sm_segment.*"))


def mpirun_of(directory: Path) -> int:
    return next(pid for pid in processes(directory) if "-n 2" in command(pid))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# Equal


def test_four_ranks_give_the_tokens_of_one(tiny_engine: Path, tiny_engine_tp4: Path, files: Path) -> None:
    requests = [Request(input_ids=PROMPT[: 1 + 20 * i], max_tokens=20) for i in range(4)]
    with Session(tiny_engine) as one:
        expected = [generate(one, r) for r in requests]
    with Session(tiny_engine_tp4) as four:
        assert len(set(four.pids)) == 4
        alone = [generate(four, r) for r in requests]
        together = [[t for o in g for t in o.token_ids] for g in [four.generate(r) for r in requests]]
    assert alone == together == expected
    assert all(len(tokens) == 20 for tokens in expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_have_the_same_bits_on_all_ranks_alone_and_in_a_batch(size: int, tmp_path: Path) -> None:
    script = tmp_path / "sums.py"
    script.write_text(SUMS_SCRIPT)
    placed = [*mpi.placement((), size), "--oversubscribe", "--bind-to", "none"]
    options = ranks.mca(ranks.MPI_OPTIONS)
    environment = {**mpi.inner_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*mpi.launcher(), *placed, *options, sys.executable, script, str(size)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["same"] * size


# Deaths


@pytest.mark.parametrize(
    ("victim", "number", "busy"),
    [
        (0, signal.SIGKILL, True),
        (0, signal.SIGSEGV, False),
        (0, signal.SIGTERM, True),
        (1, signal.SIGKILL, False),
        (1, signal.SIGSEGV, True),
        (1, signal.SIGTERM, False),
        ("mpirun", signal.SIGKILL, True),
        ("mpirun", signal.SIGKILL, False),
    ],
)
def test_a_dead_rank_is_named_and_takes_the_others_along(
    tiny_engine_tp2: Path, files: Path, victim: int | str, number: signal.Signals, busy: bool
) -> None:
    with Session(tiny_engine_tp2) as session:
        assert len(processes(files)) == 3  # with mpirun
        assert not segments(files)  # they have no names any more
        running = [session.generate(LONG) for _ in range(9)] if busy else []
        for generation in running[:1]:
            next(generation)
        start = time.monotonic()
        os.kill(session.pids[victim] if isinstance(victim, int) else mpirun_of(files), number)
        who = f"rank {victim} on {HERE} was" if isinstance(victim, int) else "mpirun was"
        for generation in running[-1:]:
            with pytest.raises(EngineError, match=f"^the engine died: {who} ended by {number.name}$"):
                list(generation)
        assert within(5, lambda: session._failure)
        with pytest.raises(EngineError, match=f"^the engine died: {who} ended by {number.name}$"):
            session.generate(LONG)
        assert within(5, lambda: not processes(files))
        assert time.monotonic() - start < 5
        assert list(files.iterdir()) == []


def test_the_only_rank_is_named(tiny_engine: Path, files: Path) -> None:
    with Session(tiny_engine) as session:
        running = session.generate(LONG)
        os.kill(session.pids[0], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"^the engine died: rank 0 ended by SIGKILL$"):
            list(running)


@pytest.mark.parametrize("hosts", [(), HOSTS], ids=["one host", "two hosts"])
def test_a_killed_session_leaves_no_orphan(
    request: pytest.FixtureRequest, tiny_engine_tp2: Path, hosts: tuple[str, ...], files: Path
) -> None:
    if hosts:
        request.getfixturevalue("second_host")
    run = [sys.executable, "-c", SESSION_SCRIPT, str(tiny_engine_tp2), *hosts]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=ROOT) as session:
        assert session.stdout is not None
        assert len(session.stdout.readline().split()) == 2
        assert len(processes(files)) >= 4
        session.kill()
    assert within(5, lambda: not processes(files))
    assert list(files.iterdir()) == []


def test_a_ready_engine_has_no_file_that_a_killed_session_would_leave(
    tiny_engine: Path, tiny_engine_tp2: Path, files: Path
) -> None:
    for engine in (tiny_engine, tiny_engine_tp2):
        with Session(engine) as session:
            assert [x.name for x in files.iterdir() if not x.name.startswith("ompi.")] == []
            assert len(generate(session, Request(input_ids=(1, 2), max_tokens=3))) == 3


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "mpirun", "session"])
def test_a_death_before_the_engine_is_ready(tiny_engine_tp2: Path, files: Path, victim: str) -> None:
    run = [sys.executable, "-c", SESSION_SCRIPT, str(tiny_engine_tp2)]
    pipe = subprocess.PIPE
    with subprocess.Popen(run, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as session:
        assert within(60, lambda: len(segments(files)) == 2)  # MPI begins, nothing is loaded
        rank = {"rank 0": 0, "rank 1": 1}.get(victim)
        found = [p for p in processes(files) if is_rank(p, rank)] if rank is not None else []
        os.kill({"mpirun": mpirun_of(files), "session": session.pid}.get(victim) or found[0], signal.SIGKILL)
        said, errors = session.communicate(timeout=30)
        assert within(5, lambda: not processes(files))
    assert said == ""
    who = f"{victim} on {HERE} was" if rank is not None else "mpirun was"
    if victim != "session":
        assert f"the engine died: {who} ended by SIGKILL" in errors
    assert list(files.iterdir()) == []


def test_a_rank_that_raises_is_quoted(tiny_engine_tp2: Path, tmp_path: Path, files: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    for file in tiny_engine_tp2.iterdir():
        (engine / file.name).write_bytes(file.read_bytes())
    os.truncate(engine / "rank1.safetensors", 100_000)
    with pytest.raises(EngineError, match=r"^the engine died: rank 1: .*rank1\.safetensors") as raised:
        Session(engine)
    assert "\n" not in str(raised.value)


def test_a_rank_that_hangs(tiny_engine_tp2: Path, files: Path) -> None:
    with Session(tiny_engine_tp2, step_timeout_s=2) as session:
        generate(session, Request(input_ids=(1,), max_tokens=2))
        time.sleep(3)  # idle is not hanging
        os.kill(session.pids[1], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"^no step has ended for 2 s, .*; rank 1 is stopped$"):
            generate(session, LONG)
        assert 2 <= time.monotonic() - start < 12
        assert within(5, lambda: not processes(files))


def test_closing_with_a_rank_that_hangs(tiny_engine_tp2: Path, files: Path) -> None:
    with Session(tiny_engine_tp2) as session:
        os.kill(session.pids[1], signal.SIGSTOP)
        start = time.monotonic()
    assert time.monotonic() - start < 12
    assert processes(files) == []


# Wrong numbers of ranks


def test_ranks_of_another_number_are_refused(tiny_engine_tp2: Path, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "own" / "socket"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        worker = [sys.executable, "-m", "engines.embedded.worker", str(tiny_engine_tp2), str(path), "--mpi"]
        run = subprocess.run(
            [*mpi.launcher(), *mpi.placement((), 3), "--oversubscribe", *worker],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=120,
            env=mpi.inner_environment(),
        )
        with listener.accept()[0] as connection, connection.makefile("rb") as lines:
            refused = json.loads(lines.readline())["refused"]
    assert refused.startswith(f"{tiny_engine_tp2}: built for 2 ranks, mpirun started 3; ")
    assert run.returncode != 0


def test_a_program_that_mpirun_started_several_times(
    tiny_engine_tp2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(UserError, match="started this program 3 times; start it once"):
        Session(tiny_engine_tp2)


def test_an_engine_that_another_host_lacks_is_named_with_the_host(tmp_path: Path) -> None:
    second = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    worker = [sys.executable, "-m", "engines.embedded.worker", str(tmp_path / "none"), str(tmp_path / "s")]
    run = subprocess.run(
        worker, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **second}
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: rank 1 on {HERE}: {tmp_path / 'none'}")
    assert run.stderr.count("\n") == 1


# Several hosts


@pytest.mark.usefixtures("second_host")
def test_two_hosts_give_the_tokens_of_one(tiny_engine_tp2: Path, files: Path) -> None:
    request = Request(input_ids=PROMPT, max_tokens=30)
    with Session(tiny_engine_tp2) as session:
        expected = generate(session, request)
    with Session(tiny_engine_tp2, hosts=HOSTS) as session:
        assert parent(session.pids[0]) == mpirun_of(files)
        assert command(parent(session.pids[1])).split()[0].endswith("/prted")
        assert generate(session, request) == expected
    assert len(expected) == 30


@pytest.mark.usefixtures("second_host")
@pytest.mark.parametrize(
    ("victim", "words"),
    [
        ("rank", f"rank 1 on {HERE} was ended by SIGKILL"),
        ("daemon", "mpirun lost a host or its daemon there"),
        ("mpirun", "mpirun was ended by SIGKILL"),
    ],
)
def test_a_death_on_another_host_ends_all(
    tiny_engine_tp2: Path, files: Path, victim: str, words: str
) -> None:
    with Session(tiny_engine_tp2, hosts=HOSTS) as session:
        running = session.generate(LONG)
        next(running)
        pid = {"rank": session.pids[1], "daemon": parent(session.pids[1]), "mpirun": mpirun_of(files)}[victim]
        start = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=f"^the engine died: {words}$"):
            list(running)
        assert within(5, lambda: not processes(files))
        assert time.monotonic() - start < 5


def test_a_host_that_cannot_be_reached_is_named(
    tiny_engine_tp2: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\necho no route to host >&2\nexit 255\n")
    agent.chmod(0o755)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(agent))
    with pytest.raises(EngineError, match="cannot start its daemon on elsewhere, exit status 255; check"):
        Session(tiny_engine_tp2, hosts=HOSTS)


def test_an_allocation_is_used_only_when_asked(
    tiny_engine_tp2: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's variables of two nodes with a place each, without Slurm."""
    for name, value in (
        ("SLURM_JOBID", "1"),
        ("SLURM_NODELIST", f"{HERE},elsewhere"),
        ("SLURM_NNODES", "2"),
        ("SLURM_TASKS_PER_NODE", "1(x2)"),
    ):
        monkeypatch.setenv(name, value)
    with Session(tiny_engine_tp2) as session:
        assert len(generate(session, Request(input_ids=PROMPT, max_tokens=3))) == 3
    with pytest.raises(EngineError, match="elsewhere"):  # it is tried, and is not there
        Session(tiny_engine_tp2, hosts=(mpi.ALLOCATION,))


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (("localhost:1", "b:2"), "^hosts: room for 3 ranks in localhost:1,b:2, the engine has 2$"),
        (("localhost:x", "b:1"), "^hosts: 'localhost:x' is not NAME or NAME:RANKS"),
        (("localhost:0", "b:2"), "^hosts: 'localhost:0' is not"),
        (("b.invalid", "localhost"), f"^hosts: b.invalid is not this host, {HERE}; name that first"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(
    tiny_engine_tp2: Path, files: Path, hosts: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Session(tiny_engine_tp2, hosts=hosts)


def test_this_host_by_its_names_and_addresses() -> None:
    assert all(map(mpi.is_this_host, (HERE, "localhost", "127.0.0.1", *addresses())))
    assert not mpi.is_this_host("192.0.2.77")  # kept for documentation, RFC 5737
    assert mpi.placement(("localhost", f"{HERE}:2"), 3) == ["-n", "3", "--host", f"localhost,{HERE}:2"]


def test_an_inner_mpirun_inherits_settings_but_no_ranks() -> None:
    user = {"OMPI_MCA_btl_tcp_if_include": "eth1", "PATH": "/bin"}
    assert mpi.inner_environment(user) == user
    assert mpi.inner_environment({**user, "PMIX_RANK": "0", "PRTE_LAUNCHED": "1"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("said", "status", "cause"),
    [
        (
            "prterun detected that one or more processes exited with non-zero status,\nthus causing the job "
            "to be terminated. The first process to do so was:\n\n   Process name: [prterun-vm-21645@1,1]\n"
            "   Exit code:    3\n",
            3,
            "rank 1 ended with exit status 3",
        ),
        ("process rank 12 with PID 0 on node\nb exited on\nsignal 9 (Killed).", 137, "rank 12 on b was"),
        ("process rank 1 with PID 7 on node b exiting\nimproperly.", 1, "rank 1 on b ended by itself"),
        ("as it could not\naccess an executable:\n\n   Executable: /p\n   Node: b\n", 1, "/p: not on b; all"),
        ("", -9, "ended by SIGKILL"),
        ("", 7, "exit status 7"),
    ],
)
def test_what_mpirun_says_becomes_one_line(said: str, status: int, cause: str) -> None:
    assert mpi.cause_of_death(said, status).startswith(cause)
