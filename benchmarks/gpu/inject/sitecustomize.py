"""Put on PYTHONPATH by parallel.py: the shadow in every worker process, its rows in a file after each step."""

import os
import sys

import wrapt

if os.environ.get("SHADOW_DIR"):
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

    def _patch(positional_dummy):
        def patch(module):
            import shadow

            def save():
                import numpy as np
                import torch

                rows = torch.stack([shadow.ROWS[i] for i in range(len(shadow.ROWS))]).cpu().numpy()
                path = os.path.join(os.environ["SHADOW_DIR"], f"{os.getpid()}.npy")
                np.save(path + ".tmp.npy", rows)
                os.replace(path + ".tmp.npy", path)

            shadow.patch_routers()
            shadow.patch_runner(module.GPUModelRunner, positional_dummy, save)

        return patch

    wrapt.register_post_import_hook(_patch(False), "vllm.v1.worker.gpu_model_runner")
    wrapt.register_post_import_hook(_patch(True), "vllm.v1.worker.gpu.model_runner")
