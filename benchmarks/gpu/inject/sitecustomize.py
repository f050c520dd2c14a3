"""Put on PYTHONPATH by parallel.py: the shadow in every worker process, its rows in a file after each step.

SHADOW_DIR: where the files go, named by data- and tensor-parallel rank. SKEW: registers the routing strategy "skewed"
with vLLM's routing simulator, a normal distribution whose mean is moved by so much towards the low experts.
Needs wrapt.
"""

import os
import sys

import wrapt

if os.environ.get("SHADOW_DIR"):
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

    def _save(runner, scheduled):
        import numpy as np
        import shadow
        import torch
        from vllm.distributed import get_tensor_model_parallel_rank

        parallel = runner.vllm_config.parallel_config
        engine = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
        rows = torch.stack([shadow.ROWS[i] for i in range(len(shadow.ROWS))]).cpu().numpy()
        name = f"dp{engine}.tp{get_tensor_model_parallel_rank()}.npy"
        path = os.path.join(os.environ["SHADOW_DIR"], name)
        if not os.path.exists(path):
            with open(path + ".router", "w") as file:  # whose decisions these are
                file.write(",".join(sorted({type(router).__name__ for router in shadow.routers()})))
            capture = getattr(runner, "_moe_monitor", None)
            graphs = list(getattr(getattr(getattr(capture, "meter", None), "graphs", None), "found", {}).values())
            if graphs:  # only the rank that counts has any
                with open(path + ".sealed", "w") as file:
                    file.write(f"{sum(graph.sealed for graph in graphs)} of {len(graphs)}")
        np.save(path + ".tmp.npy", rows)
        os.replace(path + ".tmp.npy", path)

    def _patch(positional_dummy):
        def patch(module):
            import shadow

            shadow.patch_routers()
            shadow.patch_runner(module.GPUModelRunner, positional_dummy, _save)

        return patch

    wrapt.register_post_import_hook(_patch(False), "vllm.v1.worker.gpu_model_runner")
    wrapt.register_post_import_hook(_patch(True), "vllm.v1.worker.gpu.model_runner")

if os.environ.get("SKEW"):

    def _register(module):
        skewed = module.DistributionBasedRouting("normal", mean=-float(os.environ["SKEW"]), std=1.0)
        module.RoutingSimulator.register_strategy("skewed", skewed)

    wrapt.register_post_import_hook(_register, "vllm.model_executor.layers.fused_moe.router.routing_simulator_router")
