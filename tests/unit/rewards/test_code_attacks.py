"""Hostile programs: none scores without the answer, none gets out, and the next program is judged as ever.

Each is judged under every isolation that works here, as this user and, where that is root, as an ordinary one.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.rewards.sandbox.isolation import bubblewrap_binary, strongest_first
from megatron_vcppo.rewards.sandbox.isolation_choice import choose
from tests.helpers.code_judge import Judge, nobody_python

SQUARE = [
    "assert isclose(f(2), 4)",
    "assert f(2) == 4",
    "assert abs(f(3) - 9) < 1e-6",
    "assert 16 in [f(4)]",
    "assert 0 < f(4) - f(3) == 7",
]
RIGHT = "def f(x):\n    return x * x"


def ways() -> list[tuple[str, str]]:
    users = ["me", "nobody"] if nobody_python() else ["me"]
    names = [name for name in strongest_first() if name != "bubblewrap" or bubblewrap_binary()]
    return [(name, user) for name in names for user in users]


def require(isolation: str) -> None:
    """Skip where the kernel does not have it; that it does not hold is a failure."""
    try:
        choose(isolation)
    except UserError as error:
        assert "does not start" in str(error)
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=ways(), ids="-".join)
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    isolation, user = request.param
    require(isolation)
    judge = Judge(isolation, user)
    yield judge
    judge.close()


FORGED = {
    "exits at once": "import sys\nsys.exit(0)",
    "ends the process": "import os\nos._exit(0)",
    "ends it when called": "import os\ndef f(x):\n    os._exit(0)",
    "raises SystemExit when called": "def f(x):\n    raise SystemExit(0)",
    "excepthook": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\ndef f(x):\n    return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 0",
    "exit in a thread": "import os, threading\nthreading.Timer(0.05, os._exit, (0,)).start()\ndef f(x):\n    return 0",
    "equals everything": """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __sub__(self, other): return 0
            __rsub__ = __sub__
            def __abs__(self): return 0
            def __lt__(self, other): return True
            def __hash__(self): return hash(16)
            def __contains__(self, other): return True
            def __bool__(self): return True
            __class__ = int
        def f(x): return Yes()
    """,
    "claims no type and equals everything": """
        class Yes:
            def __eq__(self, other): return True
            def __lt__(self, other): return True
            def __gt__(self, other): return True
            def __sub__(self, other): return self if isinstance(other, Yes) else 0
            def __abs__(self): return 0
            def __float__(self): return 4.0
            def __hash__(self): return hash(16)
            def __contains__(self, other): return True
        def f(x): return Yes()
    """,
    "an int that equals everything": """
        class Yes(int):
            def __eq__(self, other): return True
            def __sub__(self, other): return 0
            __hash__ = int.__hash__
        def f(x): return Yes(0)
    """,
    "patched built-ins": """
        import builtins
        builtins.exec = builtins.compile = builtins.eval = lambda *_, **__: None
        builtins.abs = lambda x: 0
        builtins.AssertionError = KeyError
        def f(x): return 0
    """,
    "own built-ins": "def abs(x): return 0\ndef isclose(*_): return True\ndef f(x): return 5",
    "patched json and os": """
        import json, os
        json.dumps = lambda *_, **__: '{"value": {"result": 4, "changed": {}}}'
        def f(x): return 0
    """,
    "a reply before it is asked": """
        import json, os, struct
        for failed in ("null",):
            text = json.dumps({"nonce": "", "failed": None}).encode()
            for file in range(64):
                try: os.write(file, struct.pack("!I", len(text)) + text)
                except OSError: pass
        def f(x): return 0
    """,
    "reads the asserts from its frames and objects": """
        import gc, re, sys
        def f(x):
            texts = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]
            frame = sys._getframe()
            while frame:
                texts += [frame.f_locals, frame.f_globals]
                frame = frame.f_back
            found = re.search(r"f\\(%d\\) (?:==|- )+ ?(\\d+)" % x, repr([sys.argv, *map(repr, texts)]))
            return int(found[1]) if found else 0
    """,
}


@pytest.mark.parametrize("name", FORGED)
def test_asserts_cannot_be_skipped(judge: Judge, name: str) -> None:
    for statement in SQUARE:
        assert judge(dedent(FORGED[name]), [statement]).startswith("wrong"), statement
    assert judge(RIGHT, SQUARE) == "correct"


MEMORY = """
import ctypes, re
def f(x):
    pattern = re.compile(b"expec" + b"ted-[0-9a-f]{{12}}-value")
    try:
        regions = [line.split() for line in open("/proc/self/maps")]
    except OSError:
        at = id(object()) & ~0xfffff
        regions = [("%x-%x" % (at, at + 0x20000), "rw-p", "", "", "0")]
    for region in regions:
        start, end = (int(part, 16) for part in region[0].split("-"))
        if region[1].startswith("rw") and end - start < 1 << 28 and "[" not in region[-1]:
            if found := pattern.search(ctypes.string_at(start, end - start)):
                return found[0].decode()
"""


def test_what_is_expected_is_not_in_the_memory_of_a_program(judge: Judge) -> None:
    """The sandbox judges many programs of one problem one after the other, each a copy of the same process."""
    expected = "expec" + f"ted-{'0f' * 6}-value"
    asserts, calls = {"asserts": [f"assert f(1) == {expected!r}"]}, {"fn_name": "f", "inputs": [[1]]}
    right = f"def f(x):\n    return {expected[:9]!r} + {expected[9:]!r}"
    for answer in (asserts, {**calls, "outputs": [expected]}):
        assert judge(right, answer) == "correct"
        assert judge(MEMORY.replace("{{", "{").replace("}}", "}"), answer) != "correct"


OUTSIDE = {
    "reads a file of the user": 'open("{secret}").read()',
    "reads it through a link": 'os.symlink("{secret}", "link"); open("link").read()',
    "links it": 'os.link("{secret}", "link")',
    "lists a folder": 'os.listdir("{folder}")',
    "changes rights": 'os.chmod("{secret}", 0o777)',
    "changes times": 'os.utime("{secret}")',
    "truncates": 'os.truncate("{secret}", 0)',
    "renames": 'os.rename("{secret}", "{folder}/other")',
    "removes": 'os.unlink("{secret}")',
    "writes next to it": 'open("{folder}/new", "w")',
    "writes to /dev/shm": 'open("/dev/shm/vcppo_attack", "w")',
    "writes to /usr": 'open("/usr/vcppo_attack", "w")' if os.getuid() == 0 else 'open("{folder}/usr", "w")',
    "the environment of the judge": 'assert b"SECRET" in open("/proc/{pid}/environ", "rb").read()',
    "the environment of anyone": """
        found = []
        for pid in os.listdir("/proc"):
            try: found += [b"SECRET" in open(f"/proc/{{pid}}/environ", "rb").read()]
            except OSError: pass
        if not any(found): raise OSError
    """,
    "its own environment": 'os.environ["SECRET"]',
    "the memory of its parent": 'open(f"/proc/{{os.getppid()}}/mem", "rb")',
    "the environment of its parent": 'open(f"/proc/{{os.getppid()}}/environ", "rb").read()',
    "the memory of the judge": 'open("/proc/{pid}/mem", "rb")',
    "a socket": "socket.socket()",
    "a datagram": 'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))',
    "listens": 'socket.create_server(("127.0.0.1", 0))',
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "kill": "os.kill({pid}, 0)",
    "kill all": "os.kill(-1, 0)",
    "kill its group": "os.kill(0, 0)",
    "fork": "os.fork() or os._exit(0)",
    "a command": 'subprocess.run(["true"])',
    "spawn": 'os.waitpid(os.posix_spawn("/usr/bin/true", ["true"], {{}}), 0)',
    "a process of multiprocessing": "process = multiprocessing.Process(target=print); process.start(); process.join()",
    "limits of another process": "resource.prlimit({pid}, resource.RLIMIT_NOFILE)",
    "affinity of another process": "os.sched_setaffinity({pid}, os.sched_getaffinity(0))",
    "niceness of a user's processes": "os.setpriority(os.PRIO_USER, 0, os.getpriority(os.PRIO_USER, 0) + 1)",
    "pidfd": "os.pidfd_open({pid})",
    "ptrace": "call(101, 16, {pid}, 0, 0); call(101, 17, {pid}, 0, 0)",
    "memory files": 'os.memfd_create("x")',
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "namespaces": "call(272, 0x10000000)",
    "io_uring": "call(425, 4, ctypes.create_string_buffer(120))",
    "its parent's death": "call(157, 1, 0, 0, 0, 0)",
    "signals through a file": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())",
    "keys": "call(248, b'user', b'x', b'y', 1, -2 & (1 << 64) - 1)",
    "a higher limit": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
}
SYSTEM_CALLS = ("call(",)
ATTEMPT = """
import ctypes, fcntl, multiprocessing, os, resource, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(*numbers):
    if libc.syscall(*[ctypes.c_ulong(n) if isinstance(n, int) else n for n in numbers]) < 0:
        raise OSError(ctypes.get_errno(), "")
try:
    {attempt}
except (OSError, ValueError, KeyError):
    print("denied")
else:
    print("through")
"""


def attempt(name: str, folder: Path, pid: int) -> str:
    text = dedent(OUTSIDE[name]).strip().format(secret=folder / "secret", folder=folder, pid=pid)
    return ATTEMPT.replace("{attempt}", text.replace("\n", "\n    "))


@pytest.fixture
def users_files(tmp_path: Path) -> Path:
    """A folder with a secret that everyone could read and change, if they saw it."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.owner() == Path(__file__).owner() and folder != Path("/tmp"):
            folder.chmod(0o777)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o666)
    return tmp_path


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_is_reached(judge: Judge, name: str, users_files: Path) -> None:
    if OUTSIDE[name].startswith(SYSTEM_CALLS) and os.uname().machine != "x86_64":
        pytest.skip("numbers of system calls are those of x86_64")
    program = attempt(name, users_files, judge.pid)
    assert judge(program, {"inputs": [""], "outputs": ["denied"]}) == "correct"
    assert (users_files / "secret").read_text() == "secret" and len(list(users_files.iterdir())) == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_attempts_are_real(name: str, users_files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without a sandbox each of them gets through (but for what only root may, where this is not root)."""
    if name in ("kill all", "kill its group", "niceness of a user's processes", "ptrace"):
        pytest.skip("would hit the machine that the tests run on")
    if name == "a higher limit":
        pytest.skip("without a limit there is none to raise")
    with subprocess.Popen(["sleep", "60"], env={"SECRET": "in the air"}) as other:
        program = attempt(name, users_files, other.pid)
        command, folder = [sys.executable, "-c", program], tmp_path_factory.mktemp("scratch")
        env = {**os.environ, "SECRET": "in the air"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=env)
        other.kill()
    for left in ("/usr/vcppo_attack", "/dev/shm/vcppo_attack"):
        Path(left).unlink(missing_ok=True)
    if name in ("keys", "io_uring", "namespaces", "shared memory") and done.stdout == "denied\n":
        pytest.skip("this machine denies it to everyone")
    assert done.stdout.endswith("through\n"), done.stderr
