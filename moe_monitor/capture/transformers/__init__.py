"""The monitor for Hugging Face transformers models; the only folder that imports transformers."""

from moe_monitor.capture.transformers.detect import UnsupportedModelError
from moe_monitor.capture.transformers.entry import expert_counts, monitor
from moe_monitor.capture.transformers.session import Monitor

__all__ = ["Monitor", "UnsupportedModelError", "expert_counts", "monitor"]
