"""The seam contract: made-up sources for the machinery, and the installed vLLM with one thing changed at a time."""

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import seam_checks  # noqa: E402
import seam_contract  # noqa: E402
from seam_checks import CHECKS, KEPT, MOE, Check, Sources, cpu_path, has, run_check, takes  # noqa: E402

SOURCE = """
from dataclasses import dataclass

if True:
    def made(app, *, other=1): ...

class Runner(Base):
    field: int = 0
    CONSTANT = 1

    def __init__(self, config):
        self.config = config
        self.deep.not_mine = 1

    @property
    def kind(self): ...

    def run(self, batch, extra=None): ...
"""


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "runner.py").write_text(SOURCE)
    return Sources(tmp_path)


@pytest.mark.parametrize(
    ("test", "state", "note"),
    [
        (has("vllm/runner.py", "Runner", "field", "CONSTANT", "config", "kind", "run"), "found", ""),
        (has("vllm/runner.py", "Runner", "gone", "kind"), "missing", "Runner has no gone in vllm/runner.py"),
        (has("vllm/runner.py", "Runner", "not_mine"), "missing", "Runner has no not_mine in vllm/runner.py"),
        (has("vllm/runner.py", "Walker"), "missing", "no class Walker in vllm/runner.py"),
        (has("vllm/moved.py", "Runner"), "missing", "no file vllm/moved.py"),
        (takes("vllm/runner.py", "run", "batch", cls="Runner"), "found", ""),
        (takes("vllm/runner.py", "run", "extra", cls="Runner"), "changed", "run(batch, extra)"),
        (takes("vllm/runner.py", "walk", cls="Runner"), "missing", "no Runner.walk in vllm/runner.py"),
        (takes("vllm/runner.py", "made", "app"), "found", ""),
        (takes("vllm/runner.py", "made", "app", "other"), "changed", "made(app)"),
    ],
)
def test_what_a_check_says(sources, test, state, note):
    result = run_check(Check("seam", "name", test), sources)
    assert (result.state, result.note) == (state, note)
    assert result.place.startswith("vllm/runner.py:") == (state != "missing")


def test_sources_that_do_not_parse_are_not_a_crash(tmp_path):
    (tmp_path / "runner.py").write_text("def run(:\n")
    result = run_check(Check("seam", "name", takes("runner.py", "run")), Sources(tmp_path))
    assert (result.state, result.place) == ("changed", "runner.py:1")


ONE = (Check("attach", "Runner.run", takes("vllm/__init__.py", "run", "batch", cls="Runner")),)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with wheels of our making: version -> content of vllm/__init__.py."""
    wheels = {}

    class Done:
        def __init__(self, returncode, stderr=""):
            self.returncode, self.stderr = returncode, stderr

    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"]
        wanted = command[-1].removeprefix("vllm==").removesuffix(".*")
        found = [v for v in wheels if v.startswith(wanted)]
        if not found:
            return Done(1, "ERROR: No matching distribution found for " + command[-1])
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / f"vllm-{found[-1]}-cp38-abi3-any.whl", "w") as wheel:
            wheel.writestr("vllm/__init__.py", wheels[found[-1]])
            wheel.writestr("vllm/_C.abi3.so", b"\0" * 1000)
            wheel.writestr("vllm/unneeded.py", "")
        return Done(0)

    monkeypatch.setattr(seam_contract.subprocess, "run", run)
    return wheels


GOOD, BAD = "class Runner:\n    def run(self, batch): ...\n", "class Runner:\n    def run(self, other): ...\n"


def test_exit_code_and_report(tmp_path, index, capsys):
    index.update({"0.26.0": GOOD, "0.27.1": GOOD})
    arguments = ["--cache", str(tmp_path / "cache"), "--versions", "0.26", "0.27", "0.28"]
    assert seam_contract.main([*arguments, "--markdown", str(tmp_path / "report.md")], ONE) == 0
    assert "0.28: no release" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "| our file | relied upon | 0.26.0 | 0.27.1 |" in report
    assert "| `attach.py` | Runner.run | found | found |" in report

    kept = sorted(str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert [k for k in kept if k.endswith(".py")] == ["0.26.0/vllm/__init__.py", "0.27.1/vllm/__init__.py"]

    saved = dict(index)
    index.clear()  # the cache suffices
    assert seam_contract.main(arguments, ONE) == 0
    (tmp_path / "cache" / "0.26.0" / "kept.txt").write_text("vllm/other.py")  # made by another version of the script
    index.update(saved)
    assert seam_contract.main(arguments, ONE) == 0
    assert (tmp_path / "cache" / "0.26.0" / "kept.txt").read_text() == "\n".join(KEPT)

    index["0.29.0"] = BAD
    assert seam_contract.main([*arguments, "0.29"], ONE) == 1
    assert "changed: attach.py: Runner.run: run(other) vllm/__init__.py:2" in capsys.readouterr().out


def test_a_version_outside_the_supported_range_does_not_fail(tmp_path, index):
    index["0.25.1"] = BAD
    assert seam_contract.main(["--cache", str(tmp_path), "--versions", "0.25"], ONE) == 0


def test_nothing_checked_is_a_failure(tmp_path, index):
    assert seam_contract.main(["--cache", str(tmp_path), "--versions", "0.26"], ONE) == 1


def test_every_supported_version_is_the_default():
    assert seam_contract.minors() == [f"0.{n}" for n in range(26, 34)]


# the installed vLLM


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the installed vLLM's files that the checks read."""
    spec = importlib.util.find_spec("vllm")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    package = Path(spec.submodule_search_locations[0])
    root = tmp_path_factory.mktemp("vllm-sources")
    for pattern in KEPT:
        for path in package.parent.glob(pattern):
            target = root / path.relative_to(package.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return root


def test_the_installed_version_keeps_the_contract(installed):
    sources = Sources(installed)
    results = {check.name: run_check(check, sources) for check in CHECKS}
    assert {name: r.note for name, r in results.items() if r.state != "found"} == {}


#: What a release might change -> the check that must notice. (file, text, replacement, check, state)
MUTATIONS = [
    ("vllm/v1/worker/gpu_model_runner.py", "self._model_forward(", "self._run_model(", "_model_forward", "changed"),
    ("vllm/v1/worker/gpu_model_runner.py", "set_forward_context(", "other_context(", "_model_forward", "changed"),
    ("vllm/v1/worker/gpu_model_runner.py", "def _dummy_run(", "def dummy_run(", "V1 _dummy_run", "missing"),
    ("vllm/v1/worker/cpu_model_runner.py", "(GPUModelRunner)", "(ModelRunnerBase)", "CPUModelRunner", "changed"),
    ("vllm/v1/worker/gpu/model_runner.py", "        dummy_run: bool = False,\n", "", "dummy_run)", "changed"),
    ("vllm/v1/worker/gpu/model_runner.py", "dummy_run=True", "dummy=True", "dummy passes", "changed"),
    ("vllm/v1/worker/gpu/model_runner.py", ".run_fullgraph(", ".replay(", "graphs are replayed", "changed"),
    ("vllm/compilation/cuda_graph.py", "entry.cudagraph.replay()", "replay(entry.cudagraph)", "V1 captures", "changed"),
    ("vllm/v1/worker/gpu/cudagraph_utils.py", "].replay()", "].run()", "V2 captures", "changed"),
    ("vllm/v1/worker/gpu/input_batch.py", "    num_tokens: int\n", "", "input_batch.num_tokens", "missing"),
    ("vllm/v1/worker/gpu/cudagraph_utils.py", "create_forward_fn(desc,", "create_forward_fn(", "descriptor", "changed"),
    ("vllm/v1/worker/gpu/model_runner.py", "self.prepare_inputs(", "self.prepare(", "prepare_inputs runs", "changed"),
    ("vllm/v1/engine/output_processor.py", "self.do_tracing(", "trace(", "finished requests", "changed"),
    ("vllm/v1/engine/input_processor.py", "def process_inputs(", "def process(", "process_inputs", "missing"),
    ("vllm/v1/metrics/stats.py", "first_token_latency", "ttft", "RequestStateStats", "missing"),
    ("vllm/v1/core/sched/output.py", "total_num_scheduled_tokens", "num_tokens", "SchedulerOutput.total", "missing"),
    (f"{MOE}/router/base_router.py", "self._compute_routing(", "compute(self, ", "on the instance", "changed"),
    (f"{MOE}/router/grouped_topk_router.py", "router_logits: torch.Tensor,", "", "every router", "changed"),
    (f"{MOE}/runner/moe_runner.py", "def is_monolithic(", "def monolithic(", "MoERunner attributes", "missing"),
    (f"{MOE}/runner/moe_runner.py", "self.router.select_experts(", "self.choose(", "layers route", "changed"),
    (f"{MOE}/runner/moe_runner.py", "torch.ops.vllm.moe_forward", "torch.moe", "opaque op", "changed"),
    (f"{MOE}/config.py", "num_logical_experts", "logical_experts", "FusedMoEConfig", "missing"),
    ("vllm/config/vllm.py", "self.additional_config", "self.more_config", "compile-cache key", "changed"),
    ("vllm/config/compilation.py", "    NONE = 0\n", "    NONE = 3\n", "CUDAGraphMode.NONE", "changed"),
    ("vllm/forward_context.py", "num_tokens_across_dp_cpu", "tokens", "DPMetadata", "missing"),
    ("vllm/v1/metrics/loggers.py", "engine_indexes", "engines", "PrometheusStatLogger", "changed"),
    ("vllm/plugins/__init__.py", "vllm.general_plugins", "vllm.plugins", "entry-point group", "changed"),
    ("vllm/entrypoints/serve/instrumentator/metrics.py", '"/metrics"', '"/stats"', "imported late", "changed"),
    ("vllm/v1/engine/utils.py", "local_client: bool", "remote: bool", "CoreEngineProcManager(", "changed"),
    ("vllm/entrypoints/cli/serve.py", "local_client=False", "local_client=None", "headless nodes", "changed"),
    ("vllm/entrypoints/cli/serve.py", "launch_core_engines(", "launch(", "RustFrontendProcessManager", "changed"),
    ("vllm/v1/utils.py", "class RustFrontendProcessManager", "class Rust", "RustFrontendProcessManager", "missing"),
    ("vllm/entrypoints/cli/serve.py", "monitor_workers=False", "watch=False", "workers alone", "changed"),
    ("vllm/v1/executor/multiproc_executor.py", "monitor_workers: bool", "watch: bool", "workers alone", "changed"),
    ("vllm/entrypoints/launchers/dp_supervisor.py", "APIServer_DPRank_", "Server_", "DPSupervisor", "changed"),
    ("vllm/ray/ray_env.py", "DEFAULT_ENV_VAR_PREFIXES: set", "PREFIXES: set", "Ray's actors get", "missing"),
    ("vllm/ray/ray_env.py", "prefixes = DEFAULT_ENV_VAR_PREFIXES", "prefixes = OTHERS", "Ray's actors get", "changed"),
    ("vllm/v1/executor/ray_executor.py", "os.environ[name]", "os.getenv(name)", "first Ray executor", "changed"),
    ("vllm/v1/executor/ray_executor.py", '"init_worker"', '"make_worker"', "first Ray executor", "changed"),
    ("vllm/v1/worker/worker_base.py", "load_general_plugins()", "load()", "first Ray executor", "changed"),
    ("vllm/v1/executor/ray_executor_v2.py", "runtime_env=runtime_env", "env=runtime_env", "second Ray", "changed"),
    ("vllm/v1/engine/utils.py", "= get_env_vars_to_copy(", "= names(", "engines that are actors", "changed"),
    ("vllm/v1/engine/utils.py", "ray.init()", "ray.init(address=None)", "starts Ray", "changed"),
    ("vllm/v1/executor/ray_executor_v2.py", "self._build_runtime_env(", "self._env(", "second Ray executor", "changed"),
    ("vllm/v1/executor/ray_executor_v2.py", '"env_vars"', '"variables"', "second Ray executor", "changed"),
    ("vllm/v1/engine/core.py", "load_general_plugins()", "load()", "when an engine core is made", "changed"),
    ("vllm/v1/engine/core.py", "engine_core.run_busy_loop()", "engine_core.run()", "loop of an engine core", "changed"),
    (
        "vllm/v1/engine/core.py",
        "def run_busy_loop(self)",
        "def run_busy_loop(self, n)",
        "a data-parallel one",
        "changed",
    ),
    ("vllm/v1/engine/core.py", "self.run_busy_loop()", "self.run()", "that are actors of Ray", "changed"),
    ("vllm/v1/executor/multiproc_executor.py", "worker_busy_loop(", "busy_loop(", "loop of a worker", "missing"),
]


@pytest.mark.parametrize(("path", "old", "new", "name", "state"), MUTATIONS, ids=[f"{m[3]}: {m[1]}" for m in MUTATIONS])
def test_a_changed_release_is_noticed(installed, tmp_path, path, old, new, name, state):
    (check,) = [c for c in CHECKS if name in c.name and (c.seam != "runner_v1" or "gpu/" not in path)]
    root = tmp_path / "sources"
    shutil.copytree(installed, root)
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    result = run_check(check, Sources(root))
    assert result.state == state, result


def test_the_cpu_path_is_told_apart(tmp_path):
    folder = tmp_path / MOE
    (folder / "router").mkdir(parents=True)
    (folder / "experts").mkdir()
    method = folder / "unquantized_fused_moe_method.py"
    method.write_text(
        "class UnquantizedFusedMoEMethod:\n    def is_monolithic(self):\n"
        "        return self.backend == UnquantizedMoeBackend.CPU\n"
    )
    assert cpu_path(Sources(tmp_path)).startswith("monolithic")

    method.write_text("class UnquantizedFusedMoEMethod: ...\n")
    experts = folder / "experts" / "cpu_moe.py"
    experts.write_text("class CPUUnquantizedExperts(mk.FusedMoEExpertsMonolithic): ...\n")
    assert "experts/cpu_moe.py:1): capture is off" in cpu_path(Sources(tmp_path))

    experts.write_text("class CPUUnquantizedExperts(mk.FusedMoEExpertsModular): ...\n")
    assert cpu_path(Sources(tmp_path)).startswith("unknown")  # no router of its own

    router = "class CPURouter:\n    def _compute_routing(self, hidden_states, router_logits, kind): ...\n"
    (folder / "router" / "cpu_router.py").write_text(router)
    assert cpu_path(Sources(tmp_path)).startswith("CPURouter._compute_routing")


def test_every_module_that_is_patched_is_kept():
    assert seam_checks.SEAMS
    for module, *_ in seam_checks.SEAMS:
        path = module.replace(".", "/") + ".py"
        assert any(Path(path).match(pattern) for pattern in KEPT), path
