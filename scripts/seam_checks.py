"""What `moe_monitor/capture/vllm` relies on in vLLM, as checks on its sources; run by seam_contract.py."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_monitor.capture.vllm.plugin import SEAMS, SUPERVISED

MOE = "vllm/model_executor/layers/fused_moe"
V1 = "vllm/v1/worker/gpu_model_runner.py"
V1_CPU = "vllm/v1/worker/cpu_model_runner.py"
V2 = "vllm/v1/worker/gpu/model_runner.py"
WARMUP = "vllm/v1/worker/gpu/warmup.py"
CORE = "vllm/v1/engine/core.py"
GRAPHS = "vllm/v1/worker/gpu/cudagraph_utils.py"
WRAPPER = "vllm/compilation/cuda_graph.py"
RUNNER = f"{MOE}/runner/moe_runner.py"
ROUTER = f"{MOE}/router/base_router.py"

#: What is kept of a wheel.
KEPT = (
    "vllm/__init__.py",
    "vllm/ray/ray_env.py",
    "vllm/version.py",
    "vllm/forward_context.py",
    WRAPPER,
    "vllm/plugins/__init__.py",
    "vllm/config/*.py",
    "vllm/distributed/__init__.py",
    "vllm/distributed/parallel_state.py",
    "vllm/entrypoints/serve/instrumentator/*.py",
    f"{MOE}/*.py",
    f"{MOE}/experts/cpu*.py",
    f"{MOE}/experts/zentorch*.py",
    f"{MOE}/oracle/unquantized.py",
    f"{MOE}/router/*.py",
    f"{MOE}/runner/*.py",
    "vllm/lora/layers/fused_moe.py",
    "vllm/model_executor/models/utils.py",
    "vllm/entrypoints/cli/serve.py",
    "vllm/entrypoints/launchers/dp_supervisor.py",
    "vllm/entrypoints/openai/dp_supervisor.py",
    "vllm/tracing/otel.py",
    "vllm/v1/core/sched/output.py",
    "vllm/v1/engine/core.py",
    "vllm/v1/engine/input_processor.py",
    "vllm/v1/engine/output_processor.py",
    "vllm/v1/engine/utils.py",
    "vllm/v1/executor/multiproc_executor.py",
    "vllm/v1/executor/ray_executor*.py",
    "vllm/v1/metrics/loggers.py",
    "vllm/v1/metrics/stats.py",
    "vllm/v1/utils.py",
    "vllm/v1/worker/*.py",
    "vllm/v1/worker/cpu/*.py",
    "vllm/v1/worker/gpu/*.py",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Missing(Exception):
    """Something relied upon is not in these sources; the message says what."""


class Changed(Exception):
    """It is there, but not as relied upon; ``line`` is where."""

    def __init__(self, message: str, path: str, line: int) -> None:
        super().__init__(message)
        self.place = f"{path}:{line}"


class Sources:
    """The Python files of one release below ``root``, parsed when asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module] = {}

    def has(self, path: str) -> bool:
        return (self.root / path).exists()

    def tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            try:
                self._trees[path] = ast.parse((self.root / path).read_bytes(), path)
            except OSError:
                raise Missing(f"no file {path}") from None
        return self._trees[path]

    def paths(self, pattern: str) -> list[str]:
        return sorted(str(p.relative_to(self.root)) for p in self.root.glob(pattern))

    def cls(self, path: str, name: str) -> ast.ClassDef:
        for node in self.tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise Missing(f"no class {name} in {path}")

    def function(self, path: str, name: str, cls: str = "") -> Function:
        """A function of a module or a class; where it is defined more than once, the last counts, as in Python."""
        body = self.cls(path, cls).body if cls else _flat(self.tree(path).body)
        found = [n for n in body if isinstance(n, Function) and n.name == name]
        if not found:
            raise Missing(f"no {f'{cls}.' if cls else ''}{name} in {path}")
        return found[-1]


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, also those under a top-level ``if`` or ``try``."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _flat(node.body)
            yield from _flat(node.orelse)


def _calls(node: ast.AST, target: str) -> list[ast.Call]:
    """Calls of ``target``, written as in the source (``self.router.select_experts``)."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == target]


def _attributes(cls: ast.ClassDef) -> dict[str, int]:
    """Names that instances of a class have by its own text -> line: fields, methods, and what methods set on self."""
    names: dict[str, int] = {}
    for node in cls.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, Function):
            names.setdefault(node.name, node.lineno)
        names.update({t.id: t.lineno for t in targets if isinstance(t, ast.Name)})
    for part in ast.walk(cls):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            names.setdefault(part.attr, part.lineno)
    return names


Test = Callable[[Sources], str]


@dataclass(frozen=True)
class Check:
    """One thing relied upon: ``seam`` is the file of ours that does, ``test`` returns the place in the source."""

    seam: str
    name: str
    test: Test


@dataclass(frozen=True)
class Result:
    """``state``: found, changed or missing; ``place``: path:line; ``note``: what differs."""

    state: str
    place: str
    note: str = ""


def has(path: str, cls: str, *names: str) -> Test:
    """A class with these attributes: fields, properties, methods or what its methods set."""

    def test(sources: Sources) -> str:
        node = sources.cls(path, cls)
        known = _attributes(node)
        lacking = [name for name in names if name not in known]
        if lacking:
            raise Missing(f"{cls} has no {', '.join(lacking)} in {path}")
        return f"{path}:{node.lineno}"

    return test


def takes(path: str, name: str, *leading: str, cls: str = "") -> Test:
    """A function or method whose positional parameters begin so (``self`` left out)."""

    def test(sources: Sources) -> str:
        node = sources.function(path, name, cls)
        got = [a.arg for a in node.args.posonlyargs + node.args.args]
        got = got[1:] if cls else got
        if got[: len(leading)] != list(leading):
            raise Changed(f"{name}({', '.join(got)})", path, node.lineno)
        return f"{path}:{node.lineno}"

    return test


def _modules(sources: Sources) -> str:
    for name, *_ in SEAMS:
        path = name.replace(".", "/") + ".py"
        if path != RAY_V1 or sources.has(path):  # from 0.33 on there is only the second
            sources.tree(path)
    return "vllm/v1, vllm/entrypoints"


def _plugin_group(sources: Sources) -> str:
    path = "vllm/plugins/__init__.py"
    node = sources.function(path, "load_general_plugins")
    text = ast.unparse(sources.tree(path))
    if "'vllm.general_plugins'" not in text:
        raise Changed("the group is not called vllm.general_plugins", path, node.lineno)
    return f"{path}:{node.lineno}"


def _ray_names(sources: Sources) -> str:
    """Prefixes of names that Ray's actors get are a set of the module's, which is looked at when actors are started."""
    tree = sources.tree(RAY)
    named = [n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == RAY_PREFIXES]
    if not named or not isinstance(named[0].value, ast.Set):
        raise Missing(f"{RAY_PREFIXES} is no set in {RAY}")
    node = sources.function(RAY, "get_env_vars_to_copy")
    if not any(isinstance(n, ast.Name) and n.id == RAY_PREFIXES for n in ast.walk(node)):
        raise Changed(f"get_env_vars_to_copy does not look at {RAY_PREFIXES}", RAY, node.lineno)
    return f"{RAY}:{node.lineno}"


def _ray_copies(path: str, cls: str, method: str) -> Test:
    """The method that starts actors asks what to copy, and copies it from the environment as it then is."""

    def test(sources: Sources) -> str:
        if path == RAY_V1 and not sources.has(path):
            return "there is none"
        node = sources.function(path, method, cls)
        text = ast.unparse(node)
        if not _calls(node, "get_env_vars_to_copy") or "os.environ[name]" not in text:
            raise Changed(f"{cls}.{method} does not copy what get_env_vars_to_copy names", path, node.lineno)
        if path == RAY_V1:  # workers load plug-ins when they are made, and must have the variables by then
            first, then = (
                text.find(f"self.collective_rpc('{name}'") for name in ("update_environment_variables", "init_worker")
            )
            if not 0 <= first < then or not _calls(
                sources.function(BASE, "init_worker", "WorkerWrapperBase"), "load_general_plugins"
            ):
                raise Changed("variables do not come before workers are made", path, node.lineno)
        return f"{path}:{node.lineno}"

    return test


def _ray_init(sources: Sources) -> str:
    """It starts Ray as ``actors._start_ray`` does in its place: without arguments, unless somebody has."""
    node = sources.function(ENGINES, "__init__", "CoreEngineActorManager")
    text = ast.unparse(node)
    if "ray.is_initialized()" not in text or "ray.init()" not in text:
        raise Changed("CoreEngineActorManager does not start Ray by ray.init()", ENGINES, node.lineno)
    return f"{ENGINES}:{node.lineno}"


def _ray_second(sources: Sources) -> str:
    """Its workers' processes start with the environment that ``_build_runtime_env`` returns."""
    node = sources.function(RAY_V2, "_build_runtime_env", "RayExecutorV2")
    if "'env_vars'" not in ast.unparse(node):
        raise Changed("_build_runtime_env has no env_vars", RAY_V2, node.lineno)
    start = sources.function(RAY_V2, "_init_executor", "RayExecutorV2")
    if not _calls(start, "self._build_runtime_env") or "runtime_env=runtime_env" not in ast.unparse(start):
        raise Changed("_init_executor does not start actors with what _build_runtime_env returns", RAY_V2, start.lineno)
    return f"{RAY_V2}:{node.lineno}"


def _supervised(sources: Sources) -> str:
    """The supervisor of several servers names their processes as we know them."""
    for folder in ("launchers", "openai"):
        path = f"vllm/entrypoints/{folder}/dp_supervisor.py"
        try:
            node = sources.function(path, "_start_children", "DPSupervisor")
        except Missing:
            continue
        for call in _calls(node, "context.Process"):
            if any(k.arg == "name" and SUPERVISED in ast.unparse(k.value) for k in call.keywords):
                return f"{path}:{call.lineno}"
        raise Changed(f"it names no process {SUPERVISED}", path, node.lineno)
    raise Missing("there is no DPSupervisor._start_children")


def _version(sources: Sources) -> str:
    text = ast.unparse(sources.tree("vllm/__init__.py"))
    if "__version__" not in text:
        raise Missing("no __version__ in vllm/__init__.py")
    return "vllm/__init__.py:1"


def _v1_cpu_load(sources: Sources) -> str:
    cls = sources.cls(V1_CPU, "CPUModelRunner")
    if "GPUModelRunner" not in [ast.unparse(b) for b in cls.bases]:
        raise Changed("CPUModelRunner is no GPUModelRunner", V1_CPU, cls.lineno)
    own = [n for n in cls.body if isinstance(n, Function) and n.name == "load_model"]
    return f"{V1_CPU}:{own[0].lineno if own else cls.lineno}"


def _v1_forward(sources: Sources) -> str:
    """The pass runs in ``self._model_forward``, called once, in ``execute_model``, within the forward context."""
    cls = sources.cls(V1, "GPUModelRunner")
    sources.function(V1, "_model_forward", "GPUModelRunner")
    execute = sources.function(V1, "execute_model", "GPUModelRunner")
    everywhere, inside = _calls(cls, "self._model_forward"), _calls(execute, "self._model_forward")
    if len(everywhere) != 1 or len(inside) != 1:
        raise Changed(f"{len(everywhere)} calls, {len(inside)} of them in execute_model", V1, execute.lineno)
    for node in ast.walk(execute):
        if (
            isinstance(node, ast.With)
            and any(_calls(item.context_expr, "set_forward_context") for item in node.items)
            and _calls(node, "self._model_forward")
        ):
            return f"{V1}:{inside[0].lineno}"
    raise Changed("not called within set_forward_context", V1, inside[0].lineno)


def _v2_state(sources: Sources) -> str:
    """``execute_model`` leaves its batch in ``execute_model_state.input_batch``, with ``num_tokens``."""
    execute = sources.function(V2, "execute_model", "GPUModelRunner")
    has(V2, "ExecuteModelState", "input_batch")(sources)
    has("vllm/v1/worker/gpu/input_batch.py", "InputBatch", "num_tokens")(sources)
    for call in _calls(execute, "ExecuteModelState"):
        if "input_batch" in [k.arg for k in call.keywords]:
            return f"{V2}:{call.lineno}"
    raise Changed("execute_model does not make an ExecuteModelState with input_batch", V2, execute.lineno)


def _v2_dummy(sources: Sources) -> str:
    """Dummy passes reach ``execute_model`` with ``dummy_run``, by name or in third place."""
    dummy = sources.function(V2, "_dummy_run", "GPUModelRunner")
    for call in _calls(dummy, "self.execute_model"):
        if "dummy_run" in [k.arg for k in call.keywords] or len(call.args) > 2:
            return f"{V2}:{call.lineno}"
    raise Changed("_dummy_run does not call execute_model with dummy_run", V2, dummy.lineno)


def _v2_warmup(sources: Sources) -> str:
    """The worker imports ``warmup_kernels`` by name and calls it with its model runner."""
    path = "vllm/v1/worker/gpu_worker.py"
    calls = _calls(sources.tree(path), "warmup_kernels")
    if not calls or not calls[0].args or ast.unparse(calls[0].args[0]) != "self.model_runner":
        raise Changed("the worker does not call warmup_kernels(self.model_runner, ...)", path, 1)
    return f"{path}:{calls[0].lineno}"


def _v2_graphs(sources: Sources) -> str:
    """Full graphs are replayed by the manager, each by its descriptor, and piecewise ones through ``run_pw_graph``."""
    cls = sources.cls(GRAPHS, "ModelCudaGraphManager")
    if "CudaGraphManager" not in [ast.unparse(b) for b in cls.bases]:
        raise Changed("ModelCudaGraphManager is no CudaGraphManager", GRAPHS, cls.lineno)
    if "run_pw_graph" in [n.name for n in cls.body if isinstance(n, Function)]:
        raise Changed("ModelCudaGraphManager has a run_pw_graph of its own", GRAPHS, cls.lineno)
    takes(GRAPHS, "run_pw_graph", "model", cls="CudaGraphManager")(sources)
    execute = sources.function(V2, "execute_model", "GPUModelRunner")
    full = _calls(execute, "self.cudagraph_manager.run_fullgraph")
    piecewise = _calls(execute, "self.cudagraph_manager.run_pw_graph")
    if not full or len(full[0].args) != 1 or not piecewise:
        raise Changed("execute_model does not replay graphs through its manager", V2, execute.lineno)
    return f"{V2}:{full[0].lineno}"


def _replays(path: str, cls: str, call: str) -> Test:
    """Graphs are captured into ``torch.cuda.CUDAGraph`` and replayed by their own ``replay``, which may be replaced."""

    def check(sources: Sources) -> str:
        made = _calls(sources.tree(path), "torch.cuda.CUDAGraph")
        calls = _calls(sources.cls(path, cls), call)
        if not made or not calls:
            raise Changed(f"no torch.cuda.CUDAGraph that is replayed by {call}()", path, sources.cls(path, cls).lineno)
        return f"{path}:{calls[0].lineno}"

    return check


def _v2_capture(sources: Sources) -> str:
    """Capture asks ``create_forward_fn`` for each graph, the descriptor first, just before it captures."""
    node = sources.function(GRAPHS, "capture", "CudaGraphManager")
    calls = _calls(node, "create_forward_fn")
    if not calls or any(not c.args or ast.unparse(c.args[0]) != "desc" for c in calls):
        raise Changed("create_forward_fn does not get the descriptor first", GRAPHS, node.lineno)
    own = sources.function(GRAPHS, "capture", "ModelCudaGraphManager")
    if not _calls(own, "super().capture"):
        raise Changed("ModelCudaGraphManager.capture does not end in its base's", GRAPHS, own.lineno)
    return f"{GRAPHS}:{calls[0].lineno}"


def _compute_routing(sources: Sources) -> str:
    """Called as an attribute of the instance, logits second, and before the ids are mapped to physical experts."""
    node = sources.function(ROUTER, "_select_experts", "BaseRouter")
    calls, mapping = _calls(node, "self._compute_routing"), _calls(node, "self._apply_eplb_mapping")
    if len(calls) != 1 or len(mapping) != 1:
        raise Changed(
            "_select_experts does not call _compute_routing and _apply_eplb_mapping once", ROUTER, node.lineno
        )
    if [ast.unparse(a) for a in calls[0].args[:2]] != ["hidden_states", "router_logits"]:
        raise Changed(ast.unparse(calls[0]), ROUTER, calls[0].lineno)
    if calls[0].lineno > mapping[0].lineno:
        raise Changed("physical experts are mapped before routing", ROUTER, mapping[0].lineno)
    return f"{ROUTER}:{calls[0].lineno}"


def _every_router(sources: Sources) -> str:
    """Each router computes its routing from (hidden_states, router_logits, ...)."""
    place = ""
    for path in sources.paths(f"{MOE}/router/*.py"):
        for cls in (n for n in sources.tree(path).body if isinstance(n, ast.ClassDef)):
            if any(isinstance(n, Function) and n.name == "_compute_routing" for n in cls.body):
                place = takes(path, "_compute_routing", "hidden_states", "router_logits", cls=cls.name)(sources)
    if not place:
        raise Missing("no router with _compute_routing")
    return f"{MOE}/router"


def _scoring(sources: Sources) -> str:
    """The routers keep ``scoring_func``; without it softmax is assumed."""
    return has(f"{MOE}/router/fused_topk_router.py", "FusedTopKRouter", "scoring_func")(sources)


def _runner_routes(sources: Sources) -> str:
    """A layer that is not monolithic gets its experts from ``self.router.select_experts``."""
    cls = sources.cls(RUNNER, "MoERunner")
    calls = _calls(cls, "self.router.select_experts")
    if not calls:
        raise Changed("MoERunner does not call self.router.select_experts", RUNNER, cls.lineno)
    return f"{RUNNER}:{calls[0].lineno}"


def _module_base(sources: Sources) -> str:
    """Runners are modules of the model, so that ``model.modules()`` meets them."""
    cls = sources.cls(RUNNER, "MoERunner")
    path = f"{MOE}/runner/moe_runner_interface.py"
    interface = sources.cls(path, "MoERunnerInterface")
    bases = [ast.unparse(b) for b in interface.bases]
    if ast.unparse(cls.bases[0]) != "MoERunnerInterface" or not {"PluggableLayer", "nn.Module"} & set(bases):
        raise Changed(f"MoERunnerInterface({', '.join(bases)})", path, interface.lineno)
    return f"{RUNNER}:{cls.lineno}"


def _opaque(sources: Sources) -> str:
    """On CUDA the layer is a custom op, on a CPU the compiler traces into it."""
    node = sources.function(RUNNER, "_select_forward", "MoERunner")
    text = ast.unparse(node)
    if "torch.ops.vllm.moe_forward" not in text or "is_cpu()" not in text:
        raise Changed(
            "_select_forward does not choose between a custom op and, on CPUs, a plain call", RUNNER, node.lineno
        )
    return f"{RUNNER}:{node.lineno}"


def _tp_rank(sources: Sources) -> str:
    place = takes("vllm/distributed/parallel_state.py", "get_tensor_model_parallel_rank")(sources)
    if "parallel_state" not in ast.unparse(sources.tree("vllm/distributed/__init__.py")):
        raise Changed("vllm.distributed does not export parallel_state", "vllm/distributed/__init__.py", 1)
    return place


def _additional_config(sources: Sources) -> str:
    """``additional_config`` enters the compile-cache key."""
    path = "vllm/config/vllm.py"
    has(path, "VllmConfig", "additional_config")(sources)
    node = sources.function(path, "compute_hash", "VllmConfig")
    if "self.additional_config" not in ast.unparse(node):
        raise Changed("compute_hash leaves additional_config out", path, node.lineno)
    return f"{path}:{node.lineno}"


def _graph_modes(sources: Sources) -> str:
    path = "vllm/config/compilation.py"
    cls = sources.cls(path, "CUDAGraphMode")
    none = [n for n in cls.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "NONE"]
    if not none or ast.unparse(none[0].value) != "0":
        raise Changed("CUDAGraphMode.NONE is not 0", path, cls.lineno)
    return f"{path}:{cls.lineno}"


def _late_import(sources: Sources) -> str:
    """``attach_router`` is imported when the server is built, after plug-ins were loaded, and mounts ``/metrics``."""
    path = "vllm/entrypoints/serve/instrumentator/__init__.py"
    metrics = "vllm/entrypoints/serve/instrumentator/metrics.py"
    node = sources.function(metrics, "attach_router")
    if "'/metrics'" not in ast.unparse(node):
        raise Changed("attach_router does not mount /metrics", metrics, node.lineno)
    for function in (n for n in ast.walk(sources.tree(path)) if isinstance(n, Function)):
        for statement in ast.walk(function):
            if isinstance(statement, ast.ImportFrom) and "attach_router" in [a.name for a in statement.names]:
                return f"{path}:{statement.lineno}"
    raise Changed("attach_router is not imported inside a function", path, 1)


def _v1_first_rows(sources: Sources) -> str:
    """``_prepare_inputs`` writes each request's first row, in the batch's order, and the end to ``query_start_loc``."""
    prepare = sources.function(V1, "_prepare_inputs", "GPUModelRunner")
    for node in ast.walk(prepare):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.query_start_loc.np[1:num_reqs + 1]":
            return f"{V1}:{node.lineno}"
    raise Changed("_prepare_inputs does not write query_start_loc.np[1 : num_reqs + 1]", V1, prepare.lineno)


def _v2_prepare(sources: Sources) -> str:
    """``prepare_inputs`` is called for real passes only, and returns the batch in the order of its rows."""
    execute = sources.function(V2, "execute_model", "GPUModelRunner")
    takes(V2, "prepare_inputs", "scheduler_output", cls="GPUModelRunner")(sources)
    has("vllm/v1/worker/gpu/input_batch.py", "InputBatch", "req_ids", "num_computed_tokens_np")(sources)
    has("vllm/v1/worker/gpu/input_batch.py", "InputBatch", "query_start_loc_np")(sources)
    calls = _calls(execute, "self.prepare_inputs")
    for node in ast.walk(execute):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not dummy_run":
            inside = [c for statement in node.body for c in _calls(statement, "self.prepare_inputs")]
            if inside and len(inside) == len(calls):
                return f"{V2}:{inside[0].lineno}"
    raise Changed("execute_model does not prepare the inputs of real passes only", V2, execute.lineno)


def _engines(sources: Sources) -> str:
    """Whoever starts engines says which, for which model, and whether for a front end in the same process."""
    node = sources.function(ENGINES, "__init__", "CoreEngineProcManager")
    got = {a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs}
    if lacking := {"local_engine_count", "start_index", "vllm_config", "local_client"} - got:
        raise Changed(f"it does not take {', '.join(sorted(lacking))}", ENGINES, node.lineno)
    return f"{ENGINES}:{node.lineno}"


def _headless(sources: Sources) -> str:
    """A headless node starts its engines with ``local_client=False``."""
    node = sources.function(SERVE, "run_headless")
    for call in _calls(node, "CoreEngineProcManager"):
        if "False" in [ast.unparse(k.value) for k in call.keywords if k.arg == "local_client"]:
            return f"{SERVE}:{call.lineno}"
    raise Changed("run_headless does not start engines with local_client=False", SERVE, node.lineno)


def _workers(sources: Sources) -> str:
    """A node that only has workers of an engine on another starts them with ``monitor_workers=False``."""
    takes(MULTIPROC, "__init__", "vllm_config", "monitor_workers", cls="MultiprocExecutor")(sources)
    node = sources.function(SERVE, "run_headless")
    for call in _calls(node, "MultiprocExecutor"):
        if "False" in [ast.unparse(k.value) for k in call.keywords if k.arg == "monitor_workers"]:
            return f"{SERVE}:{call.lineno}"
    raise Changed("run_headless does not start workers with monitor_workers=False", SERVE, node.lineno)


_CORE_LOOP, _ACTORS_LOOP, _WORKER_LOOP = (
    "engine_core.run_busy_loop",
    "self.run_busy_loop",
    "worker.worker_busy_loop",
)


def _loop(path: str, cls: str, name: str, call: str) -> Test:
    """A method that takes and is given nothing, called by its name when its object, and so plug-ins, are there."""

    def check(sources: Sources) -> str:
        node = sources.function(path, name, cls)
        if [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)] != ["self"]:
            raise Changed(f"{name}{ast.unparse(node.args)}", path, node.lineno)
        calls = _calls(sources.tree(path), call)
        if not calls or calls[0].args or calls[0].keywords:
            raise Changed(f"it is not called as {call}()", path, node.lineno)
        return f"{path}:{calls[0].lineno}"

    return check


def _core_loads(sources: Sources) -> str:
    """An engine core has loaded plug-ins when it is made, and so has a worker (see the checks of ``actors``)."""
    node = sources.function(CORE, "__init__", "EngineCore")
    text = ast.unparse(node)
    if "load_general_plugins()" not in text:
        raise Changed("EngineCore does not load plug-ins when it is made", CORE, node.lineno)
    return f"{CORE}:{node.lineno}"


def _rust_front_end(sources: Sources) -> str:
    """It is started by a manager of its own, after the engines, by ``vllm serve``."""
    sources.cls("vllm/v1/utils.py", "RustFrontendProcessManager")
    serve = sources.function(SERVE, "run_multi_api_server")
    starts, engines = _calls(serve, "RustFrontendProcessManager"), _calls(serve, "launch_core_engines")
    if not starts or not engines or starts[0].lineno < engines[0].lineno:
        raise Changed("vllm serve does not start it after the engines", SERVE, serve.lineno)
    return f"{SERVE}:{starts[0].lineno}"


def _finish_and_trace(sources: Sources) -> str:
    """The output processor calls both methods on itself, with the request first where we expect it."""
    cls = sources.cls(OUTPUT, "OutputProcessor")
    takes(OUTPUT, "_update_stats_from_finished", "req_state", "finish_reason", "iteration_stats", cls=cls.name)(sources)
    takes(OUTPUT, "do_tracing", "engine_core_output", "req_state", cls=cls.name)(sources)
    has(OUTPUT, "OutputProcessor", "tracing_enabled")(sources)
    for name in ("_update_stats_from_finished", "do_tracing"):
        if not _calls(cls, f"self.{name}"):
            raise Changed(f"{name} is not called on the processor", OUTPUT, cls.lineno)
    return f"{OUTPUT}:{cls.lineno}"


CONFIG = f"{MOE}/config.py"
OUTPUT = "vllm/v1/engine/output_processor.py"
ENGINES = "vllm/v1/engine/utils.py"
SERVE = "vllm/entrypoints/cli/serve.py"
MULTIPROC = "vllm/v1/executor/multiproc_executor.py"
BASE = "vllm/v1/worker/worker_base.py"
RAY = "vllm/ray/ray_env.py"
RAY_PREFIXES = "DEFAULT_ENV_VAR_PREFIXES"
RAY_V1 = "vllm/v1/executor/ray_executor.py"
RAY_V2 = "vllm/v1/executor/ray_executor_v2.py"
SCHEDULED = "vllm/v1/core/sched/output.py"
STATS = "vllm/v1/metrics/stats.py"
CONTEXT = "vllm/forward_context.py"
COMPILATION = "vllm/config/compilation.py"

CHECKS = (
    Check("plugin", "entry-point group vllm.general_plugins", _plugin_group),
    Check("plugin", "the modules that are patched on import", _modules),
    Check("plugin", "names of the servers of a DPSupervisor", _supervised),
    Check("versions", "vllm.__version__", _version),
    Check("runner_v1", "GPUModelRunner.load_model", takes(V1, "load_model", cls="GPUModelRunner")),
    Check("runner_v1", "CPUModelRunner.load_model", _v1_cpu_load),
    Check(
        "runner_v1",
        "execute_model(scheduler_output)",
        takes(V1, "execute_model", "scheduler_output", cls="GPUModelRunner"),
    ),
    Check("runner_v1", "_model_forward runs real passes only, in the forward context", _v1_forward),
    Check(
        "runner_v1",
        "runner attributes",
        has(V1, "GPUModelRunner", "model", "vllm_config", "device", "compilation_config"),
    ),
    Check("runners", "V1 _dummy_run, capture_model", has(V1, "GPUModelRunner", "_dummy_run", "capture_model")),
    Check("runners", "V2 _dummy_run, capture_model", has(V2, "GPUModelRunner", "_dummy_run", "capture_model")),
    Check(
        "runners",
        "SchedulerOutput.total_num_scheduled_tokens",
        has("vllm/v1/core/sched/output.py", "SchedulerOutput", "total_num_scheduled_tokens"),
    ),
    Check("runner_v2", "GPUModelRunner.load_model", takes(V2, "load_model", cls="GPUModelRunner")),
    Check(
        "runner_v2",
        "execute_model(scheduler_output, intermediate_tensors, dummy_run)",
        takes(V2, "execute_model", "scheduler_output", "intermediate_tensors", "dummy_run", cls="GPUModelRunner"),
    ),
    Check("runner_v2", "dummy passes are marked", _v2_dummy),
    Check("runner_v2", "warmup_kernels(model_runner)", takes(WARMUP, "warmup_kernels", "model_runner")),
    Check("runner_v2", "the worker warms kernels up by warmup_kernels", _v2_warmup),
    Check("runner_v2", "execute_model_state.input_batch.num_tokens", _v2_state),
    Check(
        "runner_v2",
        "runner attributes",
        has(V2, "GPUModelRunner", "model", "vllm_config", "device", "compilation_config"),
    ),
    Check(
        "runner_v2",
        "CudaGraphManager.capture(create_forward_fn)",
        takes(GRAPHS, "capture", "create_forward_fn", cls="CudaGraphManager"),
    ),
    Check("runner_v2", "capture names each graph by its descriptor", _v2_capture),
    Check(
        "runner_v2",
        "ModelCudaGraphManager.run_fullgraph(desc)",
        takes(GRAPHS, "run_fullgraph", "desc", cls="ModelCudaGraphManager"),
    ),
    Check("runner_v2", "graphs are replayed through the manager", _v2_graphs),
    Check("runner_v2", "prepare_inputs runs for real passes only", _v2_prepare),
    Check(
        "graphs",
        "V1 captures into CUDAGraph and calls its replay",
        _replays(WRAPPER, "CUDAGraphWrapper", "entry.cudagraph.replay"),
    ),
    Check(
        "graphs",
        "V2 captures into CUDAGraph and calls its replay",
        _replays(GRAPHS, "CudaGraphManager", "self.graphs[desc].replay"),
    ),
    Check(
        "latency",
        "MoERunner._forward_impl(hidden_states, router_logits)",
        takes(RUNNER, "_forward_impl", "hidden_states", "router_logits", cls="MoERunner"),
    ),
    Check(
        "latency",
        "MoERunner._apply_quant_method(hidden_states, router_logits)",
        takes(RUNNER, "_apply_quant_method", "hidden_states", "router_logits", cls="MoERunner"),
    ),
    Check(
        "latency",
        "SchedulerOutput.num_scheduled_tokens",
        has("vllm/v1/core/sched/output.py", "SchedulerOutput", "num_scheduled_tokens"),
    ),
    Check("layers", "MoERunner is a module of the model", _module_base),
    Check(
        "layers", "FusedMoEWithLoRA.base_layer", has("vllm/lora/layers/fused_moe.py", "FusedMoEWithLoRA", "base_layer")
    ),
    Check(
        "layers",
        "MoERunner attributes",
        has(
            RUNNER,
            "MoERunner",
            "layer_name",
            "router",
            "routed_experts",
            "moe_config",
            "gate",
            "shared_experts",
            "is_monolithic",
            "expert_map",
            "eplb_state",
        ),
    ),
    Check("attach", "RoutedExperts.quant_method", has(f"{MOE}/routed_experts.py", "RoutedExperts", "quant_method")),
    Check("wrapping", "layers route through router.select_experts", _runner_routes),
    Check("wrapping", "_compute_routing is called on the instance, before EPLB", _compute_routing),
    Check("wrapping", "every router's _compute_routing(hidden_states, router_logits)", _every_router),
    Check("attach", "BaseRouter.top_k", has(ROUTER, "BaseRouter", "top_k")),
    Check("attach", "router.scoring_func", _scoring),
    Check(
        "attach",
        "FusedMoEConfig fields",
        has(
            CONFIG,
            "FusedMoEConfig",
            "num_logical_experts",
            "hidden_dim",
            "hidden_dim_unpadded",
            "intermediate_size",
            "activation",
            "moe_parallel_config",
            "ep_rank",
            "ep_size",
            "is_sequence_parallel",
        ),
    ),
    Check("attach", "FusedMoEParallelConfig.use_ep", has(CONFIG, "FusedMoEParallelConfig", "use_ep")),
    Check("attach", "MoEActivation.is_gated", has(f"{MOE}/activation.py", "MoEActivation", "is_gated")),
    Check("wrapping", "the MoE layer is one opaque op, except on CPUs", _opaque),
    Check(
        "attach",
        "extract_layer_index(layer_name)",
        takes("vllm/model_executor/models/utils.py", "extract_layer_index", "layer_name"),
    ),
    Check("context", "get_tensor_model_parallel_rank", _tp_rank),
    Check(
        "identity",
        "ParallelConfig fields",
        has(
            "vllm/config/parallel.py",
            "ParallelConfig",
            "rank",
            "data_parallel_rank",
            "data_parallel_size",
            "data_parallel_index",
            "tensor_parallel_size",
        ),
    ),
    Check("identity", "ModelConfig.served_model_name", has("vllm/config/model.py", "ModelConfig", "served_model_name")),
    Check("op", "additional_config enters the compile-cache key", _additional_config),
    Check(
        "hooks",
        "CompilationConfig fields",
        has(COMPILATION, "CompilationConfig", "cudagraph_mode", "cudagraph_capture_sizes"),
    ),
    Check(
        "hooks",
        "SchedulerOutput of requests",
        has(
            SCHEDULED,
            "SchedulerOutput",
            "scheduled_new_reqs",
            "num_scheduled_tokens",
            "finished_req_ids",
            "preempted_req_ids",
        ),
    ),
    Check(
        "hooks",
        "NewRequestData fields",
        has(
            SCHEDULED,
            "NewRequestData",
            "req_id",
            "prompt_token_ids",
            "prompt_embeds",
            "num_computed_tokens",
            "sampling_params",
        ),
    ),
    Check(
        "runner_v1",
        "InputBatch.req_ids, req_id_to_index, num_computed_tokens_cpu",
        has("vllm/v1/worker/gpu_input_batch.py", "InputBatch", "req_ids", "req_id_to_index", "num_computed_tokens_cpu"),
    ),
    Check("runner_v1", "_prepare_inputs writes query_start_loc.np", _v1_first_rows),
    Check(
        "tracing",
        "InputProcessor.process_inputs",
        takes("vllm/v1/engine/input_processor.py", "process_inputs", cls="InputProcessor"),
    ),
    Check("tracing", "OutputProcessor notes finished requests and traces them", _finish_and_trace),
    Check("tracing", "RequestState.request_id, stats", has(OUTPUT, "RequestState", "request_id", "stats")),
    Check(
        "tracing",
        "RequestStateStats fields",
        has(
            STATS,
            "RequestStateStats",
            "arrival_time",
            "num_generation_tokens",
            "first_token_latency",
            "first_token_ts",
            "last_token_ts",
        ),
    ),
    Check("tracing", "IterationStats.iteration_timestamp", has(STATS, "IterationStats", "iteration_timestamp")),
    Check("tracing", "get_span_exporter(endpoint)", takes("vllm/tracing/otel.py", "get_span_exporter", "endpoint")),
    Check("context", "get_forward_context", takes(CONTEXT, "get_forward_context")),
    Check("context", "is_forward_context_available", takes(CONTEXT, "is_forward_context_available")),
    Check(
        "context",
        "ForwardContext fields",
        has(CONTEXT, "ForwardContext", "ubatch_slices", "cudagraph_runtime_mode", "batch_descriptor", "dp_metadata"),
    ),
    Check("context", "DPMetadata fields", has(CONTEXT, "DPMetadata", "num_tokens_across_dp_cpu", "local_sizes")),
    Check("context", "CUDAGraphMode.NONE is 0", _graph_modes),
    Check(
        "frontend",
        "PrometheusStatLogger(vllm_config, engine_indexes)",
        takes("vllm/v1/metrics/loggers.py", "__init__", "vllm_config", "engine_indexes", cls="PrometheusStatLogger"),
    ),
    Check(
        "frontend",
        "attach_router(app)",
        takes("vllm/entrypoints/serve/instrumentator/metrics.py", "attach_router", "app"),
    ),
    Check("frontend", "attach_router is imported late and mounts /metrics", _late_import),
    Check("loops", "plug-ins are loaded when an engine core is made", _core_loads),
    Check("loops", "the loop of an engine core", _loop(CORE, "EngineCoreProc", "run_busy_loop", _CORE_LOOP)),
    Check("loops", "the loop of a data-parallel one", _loop(CORE, "DPEngineCoreProc", "run_busy_loop", _CORE_LOOP)),
    Check(
        "loops",
        "the loop of engine cores that are actors of Ray",
        _loop(CORE, "EngineCoreProc", "run_busy_loop", _ACTORS_LOOP),
    ),
    Check("loops", "the loop of a worker", _loop(MULTIPROC, "WorkerProc", "worker_busy_loop", _WORKER_LOOP)),
    Check("beside", "CoreEngineProcManager(local_engine_count, start_index, vllm_config, local_client)", _engines),
    Check("beside", "headless nodes start engines with local_client=False", _headless),
    Check("beside", "nodes with workers alone start them with monitor_workers=False", _workers),
    Check("beside", "RustFrontendProcessManager, after the engines", _rust_front_end),
    Check("actors", "names of variables that Ray's actors get", _ray_names),
    Check(
        "actors",
        "the first Ray executor copies them",
        _ray_copies(RAY_V1, "RayDistributedExecutor", "_init_workers_ray"),
    ),
    Check(
        "actors",
        "the manager of engines that are actors copies them",
        _ray_copies(ENGINES, "CoreEngineActorManager", "__init__"),
    ),
    Check("actors", "their manager starts Ray without arguments", _ray_init),
    Check("actors", "the second Ray executor builds an environment", _ray_second),
)


def run_check(check: Check, sources: Sources) -> Result:
    try:
        return Result("found", check.test(sources))
    except Missing as error:
        return Result("missing", "", str(error))
    except Changed as error:
        return Result("changed", error.place, str(error))
    except SyntaxError as error:
        return Result("changed", f"{error.filename}:{error.lineno}", "this Python cannot parse it")


def cpu_path(sources: Sources) -> str:
    """How the CPU build decides on experts: no part of the contract, but where it differs capture is off there."""
    method = f"{MOE}/unquantized_fused_moe_method.py"
    try:
        for node in sources.cls(method, "UnquantizedFusedMoEMethod").body:
            if isinstance(node, Function) and node.name == "is_monolithic" and ".CPU" in ast.unparse(node):
                return f"monolithic ({method}:{node.lineno}): capture is off on CPUs"
        monolithic = [
            node
            for path in sources.paths(f"{MOE}/experts/cpu*.py") + sources.paths(f"{MOE}/experts/zentorch*.py")
            for node in sources.tree(path).body
            if isinstance(node, ast.ClassDef)
            and any(ast.unparse(base).endswith("FusedMoEExpertsMonolithic") for base in node.bases)
        ]
        for node in monolithic:
            if node.name == "CPUUnquantizedExperts":
                return f"monolithic ({MOE}/experts/cpu_moe.py:{node.lineno}): capture is off on CPUs"
        routing = ("_compute_routing", "hidden_states", "router_logits")
        place = takes(f"{MOE}/router/cpu_router.py", *routing, cls="CPURouter")(sources)
        still = ", ".join(sorted(node.name for node in monolithic)) or "none"
        return f"CPURouter._compute_routing ({place}): captured. Monolithic still: {still}"
    except (Missing, Changed) as error:
        return f"unknown: {error}"
