"""Calling a function once a module has been imported, without importing it.

The same as wrapt's ``register_post_import_hook``, whose import alone costs a process more than this plugin may. Every
process of a server runs this, so it imports nothing that an interpreter has not loaded at its start, and never breaks
somebody else's import.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    Hook = Callable[[ModuleType], None]


class _Finder:
    """Stands first on ``sys.meta_path`` and asks those behind it."""

    def __init__(self) -> None:
        #: Module -> what is called when it has been imported. An entry goes when its hooks are called: a module that is
        #: reloaded is not announced again, one whose import failed is.
        self.hooks: dict[str, list[Hook]] = {}
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        # Finders such as wrapt's ask from the beginning of sys.meta_path, hence also us. Other threads wait meanwhile:
        # importlib holds its lock while a finder looks.
        if fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            for finder in tuple(sys.meta_path):
                find = None if finder is self else getattr(finder, "find_spec", None)
                spec: Any = None if find is None else find(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
            return None
        finally:
            self._asking.discard(fullname)

    def imported(self, module: ModuleType, name: str) -> None:
        for hook in self.hooks.pop(name, ()):
            try:
                hook(module)
            except Exception as error:
                import logging

                # Below vLLM's own logger, so that this looks like vLLM's lines; it may not be configured yet.
                logger = logging.getLogger("vllm.moe_monitor")
                logger.warning("moe-monitor could not patch %s, serving goes on without it: %r", name, error)


class _Loader:
    """A module's own loader, and afterwards its hook."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        if name in {"_loader", "_finder"}:  # not there yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        made: ModuleType | None = None if create is None else create(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps no trace: whoever looks at its loader or its source finds what would be there without us.
        spec: Any = module.__spec__
        name = module.__name__ if spec is None else spec.name
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.imported(module, name)


_finder = _Finder()


def when_imported(name: str, hook: Hook) -> None:
    """Call `hook` with the module `name` after its next import, at once if it is there. Hooks of one module are called
    in the order in which they came.

    What a hook raises is logged, and the import goes on.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.hooks.setdefault(name, []).append(hook)
    module = sys.modules.get(name)
    if module is not None:
        _finder.imported(module, name)
