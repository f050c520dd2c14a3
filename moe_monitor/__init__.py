"""moe-monitor: runtime monitor for mixture-of-experts routing."""

__version__ = "0.1.0"
