"""Hooks on other people's imports: called once, after the module, and never in its way."""

import importlib
import importlib.util
import inspect
import logging
import os
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec, SourceFileLoader

import pytest
import wrapt

from moe_monitor.capture.vllm import imports
from moe_monitor.capture.vllm.imports import when_imported


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder for modules; what is imported from it is forgotten afterwards, and so are the hooks."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(imports._finder, "hooks", {})
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "seen.py").write_text("value = 1\n")
    package = tmp_path / "box"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("value = 2\n")
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in {"seen", "box", "late", "empty", "zipped", "made"}:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["seen", "box.inner", "box"])
def test_called_once_after_the_import(modules, name):
    calls = []
    when_imported(name, lambda module: calls.append((module, list(vars(module)))))
    assert calls == []
    module = importlib.import_module(name)
    ((called, names),) = calls
    assert called is module is sys.modules[name]
    assert name == "box" or "value" in names
    importlib.reload(module)
    importlib.import_module(name)
    assert len(calls) == 1


def test_the_module_keeps_no_trace(modules):
    plain = vars(importlib.import_module("seen")).copy()
    del sys.modules["seen"]
    when_imported("seen", lambda _: None)
    module = importlib.import_module("seen")
    assert vars(module).keys() == plain.keys()
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert module.__loader__ is module.__spec__.loader
    assert module.__spec__.origin == module.__file__ == plain["__file__"]
    assert inspect.getsource(module) == "value = 1\n"


def test_called_at_once_where_the_module_is_there(modules):
    module, calls = importlib.import_module("seen"), []
    when_imported("seen", calls.append)
    assert calls == [module]
    importlib.reload(module)
    assert calls == [module]


def test_one_of_two_that_fails_does_not_keep_the_other(modules, caplog):
    def fails(module):
        raise RuntimeError("planted")

    calls = []
    when_imported("seen", fails)
    when_imported("seen", calls.append)
    with caplog.at_level(logging.WARNING):
        module = importlib.import_module("seen")
    assert calls == [module]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("there", [False, True])
def test_what_a_hook_raises_is_logged_and_breaks_no_import(modules, caplog, there):
    def hook(module):
        raise RuntimeError("planted")

    if there:
        importlib.import_module("seen")
    with caplog.at_level(logging.WARNING):
        when_imported("seen", hook)
        module = importlib.import_module("seen")
    assert module.value == 1
    (record,) = caplog.records
    assert record.name == "vllm.moe_monitor"
    assert "could not patch seen, serving goes on without it: RuntimeError('planted')" in record.getMessage()


def test_a_module_that_fails_is_announced_when_it_succeeds(modules):
    calls = []
    (modules / "late.py").write_text("import nothing_of_this_name\n")
    when_imported("late", calls.append)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        importlib.import_module("late")
    assert calls == []
    assert "late" not in sys.modules
    (modules / "late.py").write_text("value = 'of another length'\n")
    importlib.invalidate_caches()
    assert calls == [importlib.import_module("late")]


def test_a_module_that_does_not_exist_is_said_not_to_exist(modules):
    when_imported("absent_for_sure", lambda _: None)
    assert importlib.util.find_spec("absent_for_sure") is None
    with pytest.raises(ModuleNotFoundError, match="absent_for_sure"):
        importlib.import_module("absent_for_sure")


def test_looking_for_a_module_is_not_importing_it(modules):
    calls = []
    when_imported("seen", calls.append)
    spec = importlib.util.find_spec("seen")
    assert (spec.origin, spec.loader.get_source("seen")) == (str(modules / "seen.py"), "value = 1\n")
    assert calls == []
    assert calls == [importlib.import_module("seen")]


@pytest.mark.parametrize("order", ["wrapt first", "ours first"])
def test_beside_wrapt(modules, order, monkeypatch):
    """OpenTelemetry's instrumentations use it, for the same modules perhaps."""
    monkeypatch.setattr(wrapt.importer, "_post_import_hooks_init", False)  # sys.meta_path is this test's own
    calls = []
    hooks = [
        lambda: wrapt.register_post_import_hook(lambda _: calls.append("wrapt"), "seen"),
        lambda: when_imported("seen", lambda _: calls.append("ours")),
    ]
    for register in hooks if order == "wrapt first" else reversed(hooks):
        register()
    module = importlib.import_module("seen")
    assert sorted(calls) == ["ours", "wrapt"]
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_what_has_no_loader_of_its_own_is_left_alone(modules):
    """A folder without __init__.py."""
    calls = []
    (modules / "empty").mkdir()
    when_imported("empty", calls.append)
    assert list(importlib.import_module("empty").__path__) == [str(modules / "empty")]
    assert calls == []


def test_a_loader_that_modules_share(modules, monkeypatch):
    with zipfile.ZipFile(modules / "modules.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "from zipped import other\nvalue = 3\n")
        archive.writestr("zipped/other.py", "value = 4\n")
    monkeypatch.syspath_prepend(modules / "modules.zip")
    calls = []
    when_imported("zipped", calls.append)
    module = importlib.import_module("zipped")
    assert (module.value, module.other.value) == (3, 4)
    assert calls == [module]


def test_a_loader_with_its_own_kind_of_module(modules):
    class Kind(type(sys)):
        pass

    class Maker:
        def find_spec(self, name, path=None, target=None):
            return ModuleSpec(name, self) if name == "made" else None

        def create_module(self, spec):
            return Kind(spec.name)

        def exec_module(self, module):
            module.value = 5

    sys.meta_path.insert(0, Maker())
    calls = []
    when_imported("made", calls.append)
    module = importlib.import_module("made")
    assert (type(module), module.value, calls) == (
        Kind,
        5,
        [] if imports._finder not in sys.meta_path[:1] else [module],
    )


CHILDREN = """
import os, sys, multiprocessing
import moe_monitor.capture.vllm.plugin as plugin

def child(queue):
    plugin._armed = False  # as in a process that has not registered
    plugin.register()
    queue.put(os.environ[plugin.SERVER_VARIABLE])

if __name__ == "__main__":
    plugin.register()
    plugin.register()
    assert sum(type(finder).__module__ == "moe_monitor.capture.vllm.imports" for finder in sys.meta_path) == 1
    print(os.environ[plugin.SERVER_VARIABLE])
    for name in ("ApiServer_1", "APIServer_DPRank_1"):
        for way in ("spawn", "fork", "forkserver"):
            context = multiprocessing.get_context(way)
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(queue,), name=name)
            process.start()
            print(queue.get())
            process.join()
"""


def test_children_belong_to_their_server_and_servers_are_their_own(tmp_path):
    (tmp_path / "children.py").write_text(CHILDREN)
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"_MOE_MONITOR_SERVER": "of-the-shell-that-started-it", "PYTHONPATH": path}

    done = subprocess.run(
        [sys.executable, "children.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    server, *children = done.stdout.split()
    assert server.partition("-")[0].isdigit()
    assert children[:3] == [server] * 3
    assert len({server, *children[3:]}) == 4, "each has a port and an engine of its own"


ACTORS = """
import os, sys, types
import moe_monitor.capture.vllm.plugin as plugin

class Context:
    def get_actor_id(self):
        if sys.argv[1] == "another-version":
            raise AttributeError("get_actor_id")
        return "04a2" if sys.argv[1] == "actor" else None

ray = types.ModuleType("ray")
ray.is_initialized = lambda: sys.argv[1] != "not-connected"
ray.get_runtime_context = Context
sys.modules["ray"] = ray
plugin.register()
print(os.environ[plugin.SERVER_VARIABLE], plugin.ACTORS_VARIABLE in os.environ)
"""


@pytest.mark.parametrize("process", ["actor", "driver", "not-connected", "another-version"])
def test_actors_of_ray_belong_to_the_server_that_started_them(process):
    def run(**more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("_MOE_MONITOR_")} | more
        command = [sys.executable, "-c", ACTORS, process]
        server, told = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
        return server, told == "True"

    actor = process == "actor"
    server, told = run(_MOE_MONITOR_SERVER="of-whoever-started-the-daemon", _MOE_MONITOR_SERVER_OF_ACTORS="its-own")
    assert (server == "its-own") is actor
    assert told is not actor, "it is not for what the actor starts"
    for more in ({}, {"_MOE_MONITOR_SERVER": "of-whoever-started-the-daemon"}):
        assert run(**more)[0].partition("-")[0].isdigit(), "an engine in an actor of its own"


def test_vllms_compile_cache_does_not_notice_the_plugin():
    """What is compiled with and without it on GPUs is the same, and a cache in a container's image stays of use."""
    code = """
import os
import vllm.envs
before = vllm.envs.compile_factors()
import moe_monitor.capture.vllm.plugin as plugin
plugin.register()
import vllm.ray.ray_env
assert plugin.ACTORS_VARIABLE in vllm.ray.ray_env.DEFAULT_ENV_VAR_PREFIXES
assert vllm.envs.compile_factors() == before and len(before) > 50
os.environ |= {plugin.SERVER_VARIABLE: "a", plugin.ACTORS_VARIABLE: "b", "MOE_MONITOR_LISTEN": ":9101"}
assert vllm.envs.compile_factors() == before
"""
    if importlib.util.find_spec("vllm") is None:  # to import it here would be to import it among other tests' hooks
        pytest.skip("vLLM is not installed")
    env = {k: v for k, v in os.environ.items() if not k.startswith("_MOE_MONITOR_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_switched_off_it_only_lets_actors_of_ray_know():
    code = """
import sys, types
if len(sys.argv) > 1:
    sys.modules["vllm.ray.ray_env"] = env = types.ModuleType("vllm.ray.ray_env")
    env.DEFAULT_ENV_VAR_PREFIXES = {"VLLM_"} if sys.argv[1] == "set" else ("VLLM_",)
import moe_monitor.capture.vllm.plugin as plugin
before = list(sys.meta_path)
plugin.register()
assert sys.meta_path == before
assert not [name for name in sys.modules if name.startswith("moe_monitor.capture.vllm.") and name != plugin.__name__]
if len(sys.argv) > 1:
    print(*sorted(env.DEFAULT_ENV_VAR_PREFIXES))
"""
    env = os.environ | {"MOE_MONITOR_ENABLED": "0"}
    for argument, told in ((), ""), (("set",), "MOE_MONITOR_ENABLED VLLM_"), (("another form",), "VLLM_"):
        command = [sys.executable, "-c", code, *argument]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == told
